"""Completes the OpenAPI document with what FastAPI can't know: the keys, and the form of errors."""

from typing import Any

from fastapi import FastAPI

from serve.problems import MEDIA_TYPE

_SCHEMES = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "`Authorization: Bearer KEY`, or `Token KEY`.",
    },
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def install(app: FastAPI) -> None:
    """Make the application tell the whole document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain())
        return plain()

    app.openapi = openapi


def _complete(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = _SCHEMES
    for path, item in document["paths"].items():
        for operation in item.values():
            if path.startswith("/v1/"):
                operation["security"] = [{name: []} for name in _SCHEMES]
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if status[0] in "45" and "application/json" in content:
                    content[MEDIA_TYPE] = content.pop("application/json")
