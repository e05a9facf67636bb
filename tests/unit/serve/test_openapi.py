"""The OpenAPI document: whole, with examples that the application takes."""

from typing import Any

import pytest
from fastapi import FastAPI

from memcube.config import Limits
from serve.app import create_app

METHODS = ("get", "put", "post", "delete", "patch")


async def _never() -> Any:
    raise AssertionError("the document needs no backend")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(_never, Limits())


@pytest.fixture(scope="module")
def schema(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


@pytest.fixture(scope="module")
def operations(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in schema["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    found: Any = schema
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def all_nodes(node: Any) -> Any:
    yield node
    for inner in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from all_nodes(inner)


def examples_of(schema: dict[str, Any], operation: dict[str, Any]) -> list[Any]:
    media = operation["requestBody"]["content"]["application/json"]
    body = resolved(schema, media["schema"])
    bodies = [resolved(schema, one) for one in body.get("oneOf", ())] or [body]
    shown = [e["value"] for e in media.get("examples", {}).values()]
    return [*(example for one in bodies for example in one.get("examples", ())), *shown]


def test_every_reference_of_the_document_leads_somewhere(schema):
    for node in all_nodes(schema):
        if isinstance(node, dict) and "$ref" in node:
            assert resolved(schema, node)


def test_every_operation_has_a_summary_a_description_and_a_name_of_its_own(operations):
    for name, operation in operations.items():
        assert operation.get("summary"), name
        assert operation.get("description"), name
        assert operation.get("tags"), name
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(set(ids)) == len(ids)


def test_every_body_has_an_example(schema, operations):
    for name, operation in operations.items():
        if "requestBody" in operation:
            assert examples_of(schema, operation), name


def test_every_answer_of_success_has_a_schema(operations):
    for name, operation in operations.items():
        (status,) = [status for status in operation["responses"] if status.startswith("2")]
        for media, content in operation["responses"][status]["content"].items():
            assert content["schema"], (name, media)
            if media == "application/json":
                assert content["schema"] != {}, name


def test_every_guarded_operation_documents_its_errors_as_problems(schema, operations):
    for name, operation in operations.items():
        if not name.partition(" ")[2].startswith("/v1/"):
            continue
        wanted = {"401", "403", "422", "503"} | ({"404"} if "{id}" in name else set())
        assert wanted <= set(operation["responses"]), name
        for status, response in operation["responses"].items():
            if status.startswith(("4", "5")):
                assert list(response["content"]) == ["application/problem+json"], (name, status)
                problem = resolved(
                    schema, response["content"]["application/problem+json"]["schema"]
                )
                assert problem["title"] == "ProblemOut"
                assert response["description"]


def test_the_keys_are_documented_where_they_are_needed(schema, operations):
    schemes = schema["components"]["securitySchemes"]
    kinds = {(s["type"], s.get("scheme") or s.get("name")) for s in schemes.values()}
    assert kinds == {("http", "bearer"), ("apiKey", "X-API-Key")}
    for name, operation in operations.items():
        guarded = name.partition(" ")[2].startswith("/v1/")
        named = {scheme for choice in operation.get("security", ()) for scheme in choice}
        assert named == (set(schemes) if guarded else set()), name


def test_every_path_parameter_and_field_of_a_request_is_bounded(schema, operations):
    for name, operation in operations.items():
        for parameter in operation.get("parameters", ()):
            if parameter["in"] != "path":
                continue
            bounds = parameter["schema"].keys() & {"maxLength", "maximum"}
            assert bounds, (name, parameter["name"])


def test_the_unread_framework_error_is_not_documented(schema):
    assert "HTTPValidationError" not in schema["components"]["schemas"]


async def test_every_example_is_taken_as_it_stands(api, schema, operations, operator):
    """With ids of cubes that are there in the place of the example's."""
    for name, operation in operations.items():
        if "requestBody" not in operation:
            continue
        method, path = name.split(" ")
        for example in examples_of(schema, operation):
            one, two = await api.add("tea"), await api.add("milk")
            id = (await api.ok("POST", "/v1/cubes", {}))["id"] if "members" in path else one
            if "/adapters/" in path:
                id = await api.adapter()
            if "/proposals/" in path:
                id = await api.proposal()
            if path.endswith("/move"):
                api.nodes(example["to"])
            body = dict(example)
            for field in ("ids", "members", "cube_ids"):
                if body.get(field):
                    body[field] = [one, two]
            if "adapters" in body:
                held = await api.adapter()
                body["adapters"] = [{"id": held, "version": n} for n in (1, 2)]
            if isinstance(body.get("adapter"), dict):
                body["adapter"] = {"id": await api.adapter(), "version": 1}
            at = path.replace("{id}", id).replace("{tenant}", "acme")
            response = await api.call(method, at, body, key=operator)
            assert response.is_success, (name, example, response.text)
            for made in (one, two):
                await api.call("DELETE", f"/v1/memories/{made}")


async def test_the_document_is_served(api):
    served = (await api.call("GET", "/openapi.json", key=None)).json()
    assert served["info"]["title"] == "MemOS on Ray"
    assert (await api.call("GET", "/docs", key=None)).status_code == 200
