"""Merchants: who they are, their API keys, their settings and channel credentials."""
