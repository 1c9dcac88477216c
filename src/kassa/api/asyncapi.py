"""The AsyncAPI 3 document: what travels over brokers, made of the same types as the OpenAPI document and of the topology.

Each broker calls topics and headers by names of its own. The rules are those of its file in `messaging/binders`; here they are
said again, since a binder's file can only be loaded where its client is installed. The tests hold the two together.

Source: AsyncAPI 3.0.0, https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kassa.api.openapi import Problem, told_outside, with_raw
from kassa.api.queue import CloseOrder, PayOrder, QueryOrder, RefundOrder
from kassa.messaging.broker_names import OURS, Named
from kassa.messaging.topology import PAYMENT_ORDERS, Declaration, Topic
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


class _Dialect(NamedTuple):
    """How a kind of broker calls what travels."""

    attribute: str
    """Before the name of a CloudEvents attribute."""
    reply_to: str
    correlation_id: str
    is_property: bool = False
    """Whether those two are properties of AMQP, and no headers."""
    content_type: str | None = None
    """An attribute of its own for the content type of an event."""


_OURS = _Dialect("ce-", "reply-to", "correlation-id")
_DIALECTS: Mapping[str, _Dialect] = {
    "rabbitmq": _Dialect("ce-", "reply_to", "correlation_id", is_property=True),
    "kafka": _Dialect("ce_", "reply-topic", "correlation-id"),
    "rocketmq": _Dialect("CE_", "reply-topic", "correlation-id", content_type="CE_contenttype"),
}
"""By kind of broker; the others have ours."""
_ANSWERS = "answers"


def document(
    brokers: Sequence[Named], *, version: str, raw: Mapping[str, Any], orders: Declaration | None = None
) -> dict[str, Any]:
    """The document of these brokers; of all topics, by our own names, where none is named.

    raw: schemas of fields that travel as JSON. orders: how RabbitMQ's queue payment_order is declared (`order_queue`); None: not
    known here, and so not said.
    """
    types = [*_DATA.values(), *(type_ for type_, _ in _REQUESTS.values()), Problem]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    with_raw(components, raw)
    schema_of = dict(zip(types, schemas, strict=True))
    routes = _routes(brokers)
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
        "channels": {key: channel for route in routes for key, channel in _channels(route, orders).items()},
        "operations": {route.operation: _operation(route) for route in routes},
        "components": {
            "schemas": components,
            "messages": {
                name + mark: message
                for mark, dialect in {route.mark: route.dialect for route in routes}.items()
                for name, message in _messages(schema_of, dialect).items()
            },
        },
    }
    return told_outside(document)


class _Route(NamedTuple):
    """A topic over a broker: a channel of its own, as each broker has its own address of it."""

    topic: Topic
    broker: Named | None
    suffix: str = ""
    """Tells it from the same topic over another broker."""
    mark: str = ""
    """Tells its messages from those of other dialects in the document."""

    @property
    def kind(self) -> str:
        return self.broker.name.partition("-")[0] if self.broker is not None else ""

    @property
    def dialect(self) -> _Dialect:
        return _DIALECTS.get(self.kind, _OURS)

    @property
    def is_orders(self) -> bool:
        return self.topic.name == PAYMENT_ORDERS.name

    @property
    def channel(self) -> str:
        return self.topic.name.replace(".", "_") + self.suffix

    @property
    def answers(self) -> str:
        return _ANSWERS + self.suffix

    @property
    def operation(self) -> str:
        return f"take_request{self.suffix}" if self.is_orders else f"publish_{self.channel}"


def _routes(brokers: Sequence[Named]) -> list[_Route]:
    if not brokers:
        return [_Route(topic, None) for topic in OURS.values()]
    routes: list[_Route] = []
    for name, topic in OURS.items():
        carrying = [broker for broker in brokers if name in broker.topics]
        suffixes = [f"_{broker.name}" if len(carrying) > 1 else "" for broker in carrying]
        routes += [_Route(topic, broker, suffix) for broker, suffix in zip(carrying, suffixes, strict=True)]
    if len({route.dialect for route in routes}) == 1:
        return routes
    return [route._replace(mark=f"_{route.kind}" if route.kind in _DIALECTS else "") for route in routes]


# Servers


def _server(broker: Named) -> dict[str, Any]:
    parts = urlsplit(broker.url)
    # Several hosts may stand there, so it is not taken apart further.
    host = parts.netloc.rpartition("@")[2] or "localhost"
    server = {"host": host, "protocol": _protocol(broker.url)}
    if server["protocol"] in _WITHOUT_HOST:
        server["description"] = _WITHOUT_HOST[server["protocol"]]
    path = parts.path.strip("/")
    return server | ({"pathname": f"/{path}"} if parts.scheme and path else {})


_WITHOUT_HOST = {
    "postgres": "The PostgreSQL that Kassa itself has, wherever `database_url` says.",
    "memory": "Inside of the process; nobody else reaches it.",
}


def _protocol(url: str) -> str:
    """As AsyncAPI calls it."""
    parts = urlsplit(url)
    scheme = parts.scheme or url
    if scheme == "kafka+ssl" or (scheme == "kafka" and dict(parse_qsl(parts.query)).get("tls") == "1"):
        return "kafka-secure"
    return scheme


# Channels


def _channels(route: _Route, orders: Declaration | None) -> dict[str, Any]:
    """The topic's, and beside the requests one for their answers: its address is what each request says."""
    topic = route.topic
    channel: dict[str, Any] = {
        "address": topic.name,
        "title": topic.name,
        "description": topic.about,
        "messages": _references(route, _names(topic)),
    }
    made = {route.channel: channel}
    if route.is_orders:
        made[route.answers] = {
            "address": None,
            "title": "Answers",
            "description": "Where the request's reply-to says; one that names none gets no answer.",
            "messages": _references(route, ["answer"]),
        }
    if route.broker is not None:
        channel |= _AT[route.kind](topic, route.broker, orders) if route.kind in _AT else {}
        for one in made.values():
            one["servers"] = [{"$ref": f"#/servers/{route.broker.name}"}]
    return made


def _references(route: _Route, names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/messages/{name}{route.mark}"} for name in names}


def _names(topic: Topic) -> list[str]:
    if topic.name == PAYMENT_ORDERS.name:
        return [*_REQUESTS]
    return ["envelope"] if topic.envelopes else [f"{noun}_event" for noun in EVENT_TYPES]


_At = Callable[[Topic, Named, Declaration | None], dict[str, Any]]


def _at_rabbitmq(topic: Topic, broker: Named, orders: Declaration | None) -> dict[str, Any]:
    """An exchange of the topic's name; what has a type goes under it. Requests have a queue too, which others declare."""
    vhost = unquote(urlsplit(broker.url).path[1:]) or "/"
    exchange: dict[str, Any] = {"name": topic.exchange or topic.name, "type": "topic", "vhost": vhost}
    binding: dict[str, Any] = {"is": "routingKey", "exchange": exchange}
    bindings = {"amqp": binding}
    if topic.declaration == "kassa":
        exchange["durable"] = True
        if topic.envelopes:
            return {"bindings": bindings}
        type_ = {
            "location": f"$message.header#/{_DIALECTS['rabbitmq'].attribute}type",
            "description": "The event's type",
        }
        return {"address": "{type}", "parameters": {"type": type_}, "bindings": bindings}
    queue: dict[str, Any] = {"name": topic.name, "vhost": vhost, "exclusive": False, "autoDelete": False}
    match orders:
        case "plain" | "durable":
            exchange["durable"] = queue["durable"] = orders == "durable"
        case "passive":
            queue["description"] = "Somebody else declares it, and its exchange."
        case _:
            queue["description"] = "Durable, unless the setting order_queue says otherwise; `kassa up` has it plain."
    # The binding has room for an exchange or a queue.
    binding["x-queue"] = queue
    return {"bindings": bindings}


def _at_kafka(topic: Topic, broker: Named, orders: Declaration | None) -> dict[str, Any]:
    partitions = {} if topic.lanes == 1 else {"partitions": topic.lanes}
    return {"bindings": {"kafka": {"topic": topic.name, **partitions}}}


def _at_rocketmq(topic: Topic, broker: Named, orders: Declaration | None) -> dict[str, Any]:
    """AsyncAPI has no binding for it. No names with dots there; the tag is the event's type."""
    name = topic.name.replace(".", "--")
    binding = {"topic": name, "type": "FIFO" if topic.keyed else "NORMAL", "queues": topic.lanes}
    tag = (
        {} if topic.envelopes or not topic.keyed else {"tag": f"$message.header#/{_DIALECTS['rocketmq'].attribute}type"}
    )
    return {"address": name, "bindings": {"x-rocketmq": binding | tag}}


def _at_zeromq(topic: Topic, broker: Named, orders: Declaration | None) -> dict[str, Any]:
    return {"bindings": {"x-zeromq": {"topic": topic.name, "client": "kassa.messaging"}}}


def _at_postgres(topic: Topic, broker: Named, orders: Declaration | None) -> dict[str, Any]:
    functions = ["kassa_send"] if topic.name == PAYMENT_ORDERS.name else ["kassa_listen", "kassa_receive"]
    return {"bindings": {"x-postgres": {"topic": topic.name, "functions": functions}}}


_AT: Mapping[str, _At] = {
    "rabbitmq": _at_rabbitmq,
    "kafka": _at_kafka,
    "rocketmq": _at_rocketmq,
    "zeromq": _at_zeromq,
    "postgres": _at_postgres,
}
"""What a channel is on each kind of broker."""


def _operation(route: _Route) -> dict[str, Any]:
    channel = {"$ref": f"#/channels/{route.channel}"}
    if not route.is_orders:
        return {"action": "send", "channel": channel, "summary": route.topic.about}
    return {
        "action": "receive",
        "channel": channel,
        "summary": "Does what is asked, once for each key, and answers.",
        "reply": {
            "address": {
                "location": f"$message.header#/{route.dialect.reply_to}",
                "description": "The queue or topic of the answer",
            },
            "channel": {"$ref": f"#/channels/{route.answers}"},
            "messages": [{"$ref": f"#/channels/{route.answers}/messages/answer"}],
        },
    }


# Messages


def _messages(schema_of: Mapping[Any, Any], dialect: _Dialect) -> dict[str, Any]:
    messages = {name: _request(name, type_, says, schema_of, dialect) for name, (type_, says) in _REQUESTS.items()}
    messages["answer"] = {
        "title": "The answer",
        "summary": "What the REST API would have answered: the object, or the problem document.",
        "contentType": "application/json",
        "headers": {
            "type": "object",
            "properties": {
                dialect.correlation_id: {"type": "string", "description": _placed("The request's", dialect)},
                "kassa-status": {"type": "string", "description": "The status that the REST API answers with"},
            },
        },
        "correlationId": {"location": f"$message.header#/{dialect.correlation_id}"},
        "payload": {"anyOf": [schema_of[PaymentView], schema_of[RefundView], schema_of[Problem]]},
    }
    for noun, types in EVENT_TYPES.items():
        messages[f"{noun}_event"] = _event(noun, types, schema_of, dialect)
    messages["envelope"] = {
        "title": "An envelope of events",
        "summary": "CloudEvents in JSON batch mode: between 1 and 100 events of one lane, each as on kassa.events.",
        "contentType": "application/cloudevents-batch+json",
        "payload": {"type": "array", "minItems": 1, "items": {"type": "object", "required": [*_ATTRIBUTES]}},
    }
    return messages


_ATTRIBUTES = ("specversion", "id", "source", "type")


def _placed(says: str, dialect: _Dialect) -> str:
    return f"{says} (a property of AMQP)" if dialect.is_property else says


def _request(name: str, type_: Any, says: str, schema_of: Mapping[Any, Any], dialect: _Dialect) -> dict[str, Any]:
    asked = _placed("Where the answer goes; without it there is none", dialect)
    return {
        "title": name,
        "summary": says,
        "contentType": "application/json",
        "headers": {
            "type": "object",
            "properties": {
                dialect.reply_to: {"type": "string", "description": asked},
                dialect.correlation_id: {
                    "type": "string",
                    "description": _placed("Comes back with the answer", dialect),
                },
            },
        },
        "correlationId": {"location": f"$message.header#/{dialect.correlation_id}"},
        "payload": schema_of[type_],
        "examples": [{"payload": _EXAMPLES[name]}],
    }


def _event(noun: str, types: Sequence[str], schema_of: Mapping[Any, Any], dialect: _Dialect) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "description": "evt_…; the same each time it comes"},
        "source": {"const": "kassa"},
        "type": {"enum": [f"{noun}.{type_}" for type_ in types]},
        "subject": {"type": "string", "description": "The root: the payment, the top-up …"},
        "time": {"type": "string", "format": "date-time"},
        "sequence": {"type": "string", "description": "Counts per root, without gaps"},
    }
    headers = {dialect.attribute + name: schema for name, schema in attributes.items()}
    if dialect.content_type is not None:
        headers[dialect.content_type] = {"const": "application/json"}
    return {
        "title": f"{noun}.*",
        "summary": "A CloudEvent in binary mode; its data is the object as it was then.",
        "contentType": "application/json",
        "headers": {"type": "object", "properties": headers, "required": [*headers]},
        "payload": schema_of[_DATA[noun]] if noun in _DATA else {"type": "object"},
    }
