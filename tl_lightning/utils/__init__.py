"""Helpers that know nothing of transfer learning or Lightning."""
