"""Embedding models and rerankers: vectors of texts, and how well documents answer a query."""
