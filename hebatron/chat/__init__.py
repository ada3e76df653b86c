"""Chats: templates in a sandbox, samples with loss masks, packed rows, and a conversation with a model."""
