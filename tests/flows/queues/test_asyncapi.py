"""The document of the queues is valid AsyncAPI 3, and knows what really travels."""

import json
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jsonschema_rs

from flows.api.support import running
from kassa.api import asyncapi
from kassa.api.server import RAW
from kassa.messaging.brokers import read_brokers

SCHEMA = json.loads((Path(__file__).parent / "asyncapi-3.0.0.json").read_text())
"""The schema of AsyncAPI 3.0.0 as its authors publish it (spec-json-schemas, Apache-2.0), without descriptions and examples."""


def test_the_document_is_valid_asyncapi_for_each_set_of_brokers() -> None:
    validator = jsonschema_rs.validator_for(SCHEMA)
    for urls in ((), ("postgres",), ("memory#payment_order", "postgres#kassa.events,kassa.events.batch")):
        document = asyncapi.document(read_brokers(urls), version=version("kassa"), raw=RAW)
        assert [f"{list(error.instance_path)}: {error.message}" for error in validator.iter_errors(document)] == []


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi.document(read_brokers(("postgres",)), version="1", raw=RAW)
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)))
    assert len(references) > 10
    for reference in references:
        found = document
        for part in reference.split("/"):
            found = found[part]


def test_every_event_that_a_payment_can_tell_of_is_in_it() -> None:
    told: set[str] = set()
    for name in ("draft.py", "model.py", "refunds.py"):
        text = (files("kassa.payments") / name).read_text()
        told |= {f"payment.{what}" for what in re.findall(r'\.tell\("([a-z_]+)"', text)}
        told |= {f"refund.{what}" for what in re.findall(r'\.tell_refund\("([a-z_]+)"', text)}
    known = {f"{noun}.{type_}" for noun, types in asyncapi.EVENT_TYPES.items() for type_ in types}

    assert len(told) > 10
    assert told <= known


def test_a_password_is_not_in_it() -> None:
    document = asyncapi.document(
        read_brokers(("postgres://shop:secret@db.example/x?password=secret",)), version="1", raw=RAW
    )

    assert "secret" not in json.dumps(document)


async def test_the_api_shows_it(database_url: str) -> None:
    async with running(database_url, brokers=("postgres#payment_order",)) as house:
        shown = (await house.http.get("/asyncapi.json")).json()

    assert list(shown["channels"]) == ["payment_order"]
    assert shown["channels"]["payment_order"]["servers"] == [{"$ref": "#/servers/postgres"}]
