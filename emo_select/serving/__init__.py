"""Serving a pruned or finetuned checkpoint by another program's OpenAI-compatible server. See docs/use.md."""
