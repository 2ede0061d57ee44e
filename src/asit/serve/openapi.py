"""Describe the HTTP API as OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0), made from the endpoint table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from asit import __version__
from asit.serve.routes import ENDPOINTS, GETS, QueryOption

_TYPES = {int: "integer", float: "number", str: "string"}
_JSON = {"application/json": {"schema": {"type": "object"}}}
_SOUND = {"audio/wav": {"schema": {"type": "string", "format": "binary"}}}
_ERROR = {
    "description": "Refused: what was found, what was expected, and the fix.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("found", "expected", "remedy")},
                "required": ["found", "expected", "remedy"],
            }
        }
    },
}


def document() -> dict[str, Any]:
    """Return the OpenAPI document of all endpoints."""
    paths: dict[str, Any] = {}
    for path, (about, options) in GETS.items():
        numbered = "{number}" in path
        number = {"name": "number", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
        paths[path] = {
            "get": {
                "operationId": f"get_{path.removeprefix('/api/').partition('/')[0]}" + "_of_clip" * numbered,
                "summary": about,
                "parameters": [number] * numbered + _parameters(options),
                "responses": _responses(_SOUND if "/clip/" in path else _JSON),
            }
        }
    for name, (about, options) in ENDPOINTS.items():
        sound = {"schema": {"type": "string", "format": "binary"}}
        paths[f"/api/{name}"] = {
            "post": {
                "operationId": name,
                "summary": about,
                "parameters": _parameters(options),
                "requestBody": {
                    "required": True,
                    "description": "the bytes of an audio file",
                    "content": {"application/octet-stream": sound, "audio/*": sound},
                },
                "responses": _responses(_JSON),
            }
        }
    return {"openapi": "3.1.0", "info": {"title": "asit serve", "version": __version__}, "paths": paths}


def _parameters(options: Mapping[str, QueryOption]) -> list[dict[str, Any]]:
    made = []
    for name, option in options.items():
        schema: dict[str, Any] = {"type": _TYPES[option.kind]}
        for key, value in (("minimum", option.low), ("maximum", option.high)):
            if math.isfinite(value):
                schema[key] = value
        if option.choices:
            schema["enum"] = list(option.choices)
        if option.default is not None:
            schema["default"] = option.default
        made.append({"name": name, "in": "query", "required": False, "description": option.about, "schema": schema})
    return made


def _responses(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"200": {"description": "the answer", "content": content}, "4XX": _ERROR, "5XX": _ERROR}
