"""The small files of a checkpoint, beside its weights and config.json, that its conversion has as well."""

from __future__ import annotations

TOKENIZER = "tokenizer.json"
TEMPLATES = "additional_chat_templates/*.jinja"
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
)
"""Patterns of paths in the checkpoint's directory: the tokenizer, chat templates and defaults of sampling."""
FOR_PEOPLE = ("LICENSE", "README.md")
"""Files that a program does not read."""
