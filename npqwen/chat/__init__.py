"""Conversations: messages to prompts, and generated text to reasoning, answers and tool calls."""
