"""Conversations: messages to a prompt, and what comes back to thoughts, answers and tool calls."""
