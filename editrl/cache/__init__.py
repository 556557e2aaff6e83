"""Conditions on the disk: encoded once by `editrl precompute`, read by every training run after it."""

from editrl.cache.conditions import CachedRows, ConditionsCache, open_cache
from editrl.cache.encoding import Encoded, encode_examples
from editrl.cache.filling import Filled, fill, size_text
from editrl.cache.fingerprint import module_fingerprint, settings_fingerprint, tokenizer_fingerprint

__all__ = [
    "CachedRows",
    "ConditionsCache",
    "Encoded",
    "Filled",
    "encode_examples",
    "fill",
    "module_fingerprint",
    "open_cache",
    "settings_fingerprint",
    "size_text",
    "tokenizer_fingerprint",
]
