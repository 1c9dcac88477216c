"""The AsyncAPI 3 document: what travels over brokers, made of the same types as the OpenAPI document and of the topology.

Source: AsyncAPI 3.0.0, https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kassa.api.openapi import Problem, told_outside, with_raw
from kassa.api.queue import CloseOrder, PayOrder, QueryOrder, RefundOrder
from kassa.messaging.brokers import OURS, Named
from kassa.messaging.topology import PAYMENT_ORDERS, Topic
from kassa.payments.render import PaymentView, RefundView, TopupView, WalletView

ASYNCAPI = "3.0.0"
_REF = "#/components/schemas/{name}"

_OF_PAYMENTS = (
    "processing", "attempt_failed", "unknown", "succeeded", "closed", "late_succeeded", "late_refunding", "late_refunded",
    "held", "duplicate_paid", "duplicate_accepted", "duplicate_held",
)  # fmt: skip
EVENT_TYPES: Mapping[str, tuple[str, ...]] = {
    "payment": _OF_PAYMENTS,
    "topup": _OF_PAYMENTS,
    "refund": ("created", "succeeded", "failed", "abnormal", "reversed", "cancelled"),
    "wallet": ("created",),
    "webhook_endpoint": ("paused",),
}
"""By noun. More may come: who reads events leaves alone what he does not know."""
_DATA: Mapping[str, Any] = {"payment": PaymentView, "topup": TopupView, "refund": RefundView, "wallet": WalletView}
_REQUESTS: Mapping[str, tuple[Any, str]] = {
    "pay": (PayOrder, "Take a payment; `action` may be left out."),
    "refund": (RefundOrder, "Give money of a payment back."),
    "query": (QueryOrder, "Ask how a payment or a refund stands."),
    "close": (CloseOrder, "Give up a payment that is not paid."),
}
_EXAMPLES: Mapping[str, dict[str, Any]] = {
    "pay": {"order_id": "123456", "amount": 100},
    "refund": {"action": "refund", "order_id": "123456", "refund_id": "r-1", "amount": 30},
    "query": {"action": "query", "order_id": "123456"},
    "close": {"action": "close", "order_id": "123456"},
}

_PROTOCOLS = {"kafka+ssl": "kafka-secure"}
"""Where AsyncAPI calls it otherwise than the URL."""


def document(brokers: Sequence[Named], *, version: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The document of these brokers; of all topics where none is named. raw: schemas of fields that travel as JSON."""
    types = [*_DATA.values(), *(type_ for type_, _ in _REQUESTS.values()), Problem]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    with_raw(components, raw)
    schema_of = dict(zip(types, schemas, strict=True))
    topics = [OURS[name] for name in OURS if not brokers or any(name in broker.topics for broker in brokers)]
    document: dict[str, Any] = {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "Kassa",
            "version": version,
            "description": "Requests to pay over a queue, their answers, and an event for everything that happens to money.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {broker.name: _server(broker) for broker in brokers},
        "channels": {_key(topic): _channel(topic, brokers) for topic in topics},
        "operations": _operations(topics),
        "components": {"schemas": components, "messages": _messages(schema_of)},
    }
    return told_outside(document)


def _key(topic: Topic) -> str:
    return topic.name.replace(".", "_")


def _server(broker: Named) -> dict[str, Any]:
    parts = urlsplit(broker.url)
    # Several hosts may stand there, so it is not taken apart further.
    host = parts.netloc.rpartition("@")[2] or "localhost"
    server = {"host": host, "protocol": _PROTOCOLS.get(parts.scheme, parts.scheme or broker.url)}
    path = parts.path.strip("/")
    return server | ({"pathname": f"/{path}"} if path else {})


def _channel(topic: Topic, brokers: Iterable[Named]) -> dict[str, Any]:
    carrying = [broker.name for broker in brokers if topic.name in broker.topics]
    channel: dict[str, Any] = {
        "address": topic.name,
        "title": topic.name,
        "description": topic.about,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _names(topic)},
        "bindings": _bindings(topic),
    }
    if carrying:
        channel["servers"] = [{"$ref": f"#/servers/{name}"} for name in carrying]
    return channel


def _names(topic: Topic) -> list[str]:
    if topic.name == PAYMENT_ORDERS.name:
        return [*_REQUESTS]
    return ["envelope"] if topic.envelopes else [f"{noun}_event" for noun in EVENT_TYPES]


def _bindings(topic: Topic) -> dict[str, Any]:
    """Each broker's address of the topic."""
    exchange = {"name": topic.exchange or topic.name, "type": "topic", "durable": topic.exchange is None}
    kafka = {"topic": topic.name} | ({} if topic.lanes == 1 else {"partitions": topic.lanes})
    return {"amqp": {"is": "routingKey", "exchange": exchange}, "kafka": kafka}


def _operations(topics: Sequence[Topic]) -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for topic in topics:
        channel = {"$ref": f"#/channels/{_key(topic)}"}
        if topic.name != PAYMENT_ORDERS.name:
            operations[f"publish_{_key(topic)}"] = {"action": "send", "channel": channel, "summary": topic.about}
            continue
        operations["take_request"] = {
            "action": "receive",
            "channel": channel,
            "summary": "Does what is asked, once for each key, and answers.",
            "reply": {
                "address": {
                    "location": "$message.header#/reply-to",
                    "description": "The queue (RabbitMQ: property reply_to) or topic (Kafka: header reply-topic) of the answer",
                },
            },
        }
    return operations


def _messages(schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    messages = {name: _request(name, type_, says, schema_of) for name, (type_, says) in _REQUESTS.items()}
    messages["answer"] = {
        "title": "The answer",
        "summary": "What the REST API would have answered: the object, or the problem document.",
        "contentType": "application/json",
        "headers": {"type": "object", "properties": {"correlation-id": {"type": "string"}, "kassa-status": _STATUS}},
        "correlationId": {"location": "$message.header#/correlation-id"},
        "payload": {"anyOf": [schema_of[PaymentView], schema_of[RefundView], schema_of[Problem]]},
    }
    for noun, types in EVENT_TYPES.items():
        messages[f"{noun}_event"] = _event(noun, types, schema_of)
    messages["envelope"] = {
        "title": "An envelope of events",
        "summary": "CloudEvents in JSON batch mode: between 1 and 100 events of one lane, each as on kassa.events.",
        "contentType": "application/cloudevents-batch+json",
        "payload": {"type": "array", "minItems": 1, "items": {"type": "object", "required": [*_ATTRIBUTES]}},
    }
    return messages


_STATUS = {"type": "string", "description": "The status that the REST API answers with"}
_ATTRIBUTES = ("specversion", "id", "source", "type")


def _request(name: str, type_: Any, says: str, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "title": name,
        "summary": says,
        "contentType": "application/json",
        "headers": {
            "type": "object",
            "properties": {
                "reply-to": {"type": "string", "description": "Where the answer goes; without it there is none"},
                "correlation-id": {"type": "string", "description": "Comes back with the answer"},
            },
        },
        "correlationId": {"location": "$message.header#/correlation-id"},
        "payload": schema_of[type_],
        "examples": [{"payload": _EXAMPLES[name]}],
    }


def _event(noun: str, types: Sequence[str], schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    attributes = {
        "ce-specversion": {"const": "1.0"},
        "ce-id": {"type": "string", "description": "evt_…; the same each time it comes"},
        "ce-source": {"const": "kassa"},
        "ce-type": {"enum": [f"{noun}.{type_}" for type_ in types]},
        "ce-subject": {"type": "string", "description": "The root: the payment, the top-up …"},
        "ce-time": {"type": "string", "format": "date-time"},
        "ce-sequence": {"type": "string", "description": "Counts per root, without gaps"},
    }
    return {
        "title": f"{noun}.*",
        "summary": "A CloudEvent in binary mode; its data is the object as it was then.",
        "contentType": "application/json",
        "headers": {"type": "object", "properties": attributes, "required": [*attributes]},
        "payload": schema_of[_DATA[noun]] if noun in _DATA else {"type": "object"},
    }
