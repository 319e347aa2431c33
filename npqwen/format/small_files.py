"""The small files of a checkpoint, besides its weights and config.json, that its conversion has as well."""

from __future__ import annotations

TOKENIZER = "tokenizer.json"
TEMPLATES = "additional_chat_templates/*.jinja"
MODULES = "1_*/config.json"
SMALL_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    TEMPLATES,
    "generation_config.json",
    "modules.json",
    MODULES,
    "config_sentence_transformers.json",
)
"""Patterns of paths in the checkpoint's directory: the tokenizer, chat templates, sampling defaults, and what
sentence-transformers needs of an embedding model or reranker."""
DOCUMENTS = ("LICENSE", "README.md")
"""Copied too, but not in the checksums: users may edit them. The card's `pipeline_tag` is read (task.py)."""
