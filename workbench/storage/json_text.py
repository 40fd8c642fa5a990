"""JSON that HTML cannot misread, and the hashes that a Content-Security-Policy and the page checker compare."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_for_html(value: object) -> str:
    """JSON in ASCII that is safe inside a script element: no <, > or &; NaN becomes null.

    >>> json_for_html({"token": "</script>", "value": float("nan")})
    '{"token":"\\\\u003c/script\\\\u003e","value":null}'
    """
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def finite(value: Any) -> Any:
    """The value in JSON's own types: tuples as lists, other keys and objects as text, NaN and infinity as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [finite(item) for item in sorted(value, key=str)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return str.__str__(value) if isinstance(value, str) else str(value)


def digest(text: str) -> str:
    """The hash of an inline block as a Content-Security-Policy writes it: sha256-<base64>."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
