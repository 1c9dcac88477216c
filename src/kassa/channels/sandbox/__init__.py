"""Providers that are not real: each a process of its own with the provider's signed wire, its own keys and its own books.

They judge the channel files, so they share no code with them beyond the published signatures and ciphers.
"""
