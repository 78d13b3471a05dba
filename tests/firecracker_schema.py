"""Firecracker's own description of its API, and whether a request is as it says.

The description (Swagger 2.0, Apache-2.0, of the firecracker-microvm project) is read from beside
the project; it is not a part of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml

DESCRIPTION = Path(__file__).parents[2] / "shared/data/firecracker-api-v1.16.1.yaml"


class Undescribed(Exception):
    """A request that the description does not have; its text says why."""


class Description:
    """What requests there are. Read once: it takes a second."""

    def __init__(self, path: Path = DESCRIPTION) -> None:
        self._api: dict[str, Any] = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        self.version = str(self._api["info"]["version"])
        for definition in self._api["definitions"].values():
            # Firecracker refuses fields that it does not know (serde's deny_unknown_fields);
            # Swagger cannot say so.
            if "properties" in definition:
                definition.setdefault("additionalProperties", False)
        # `X-Forms` of paths: /drives/{drive_id} -> a pattern.
        self._paths = {
            re.compile(re.sub(r"\{[^}]*\}", "([^/]+)", path)): operations
            for path, operations in self._api["paths"].items()
        }

    def check(self, method: str, path: str, body: object | None) -> None:
        """Raise Undescribed for a request that is not as the description says."""
        operation = self._operation(method, path)
        described = [each for each in operation.get("parameters", ()) if each["in"] == "body"]
        if body is None:
            if any(each.get("required") for each in described):
                raise Undescribed(f"{method} {path} has no body")
            return
        if not described:
            raise Undescribed(f"{method} {path} has a body")
        schema = {**described[0]["schema"], "definitions": self._api["definitions"]}
        try:
            jsonschema.Draft4Validator(schema).validate(body)
        except jsonschema.ValidationError as error:
            raise Undescribed(f"{error.json_path}: {error.message}") from error

    def take(self, definition: str, field: str, least: int, most: int) -> None:
        """Have a number described as from `least` to `most`, where more is understood than the
        description says will be done."""
        described = self._api["definitions"][definition]["properties"][field]
        described |= {"minimum": least, "maximum": most}

    def check_answer(self, method: str, path: str, status: int, body: object | None) -> None:
        """Raise Undescribed for an answer that is not as the description says."""
        responses = self._operation(method, path)["responses"]
        described = responses.get(status, responses.get(str(status), responses.get("default")))
        schema = described.get("schema")
        if (schema is None) != (body is None):
            raise Undescribed(f"{method} {path}: {status} has {'a' if body else 'no'} body")
        if schema is not None:
            whole = {**schema, "definitions": self._api["definitions"]}
            try:
                jsonschema.Draft4Validator(whole).validate(body)
            except jsonschema.ValidationError as error:
                raise Undescribed(f"{error.json_path}: {error.message}") from error

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        for pattern, operations in self._paths.items():
            if pattern.fullmatch(path) and method.lower() in operations:
                operation: dict[str, Any] = operations[method.lower()]
                return operation
        raise Undescribed(f"there is no {method} {path}")
