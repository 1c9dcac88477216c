"""Kassa: the payment system that a merchant, a marketplace or a payment company runs itself."""
