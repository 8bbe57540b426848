"""Adapters with the names that users of other libraries type. Nothing is patched on import."""
