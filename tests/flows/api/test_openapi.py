"""The whole document, driven by schemathesis: no fault of ours, and no answer that the document does not know."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from flows.api.support import House, Shop
from flows.wechat_sandbox import SandboxProcess

EXAMPLES = "4"
"""Per route and phase, beside what the coverage phase makes of every field: which is most of the requests."""
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method",
    "ignored_auth", "use_after_free", "ensure_resource_availability",
)  # fmt: skip
"""All but the one that wants every valid body accepted: an order that exists is a refusal that no schema can know."""


async def things_of(shop: Shop) -> dict[str, str]:
    """One of each noun, so that the routes have something to act on."""
    wallet = await shop.wallet(1_000_000)
    paid = (await shop.pay(wallet, 100_000)).json()
    refund = (await shop.post(f"/v1/payments/{paid['id']}/refunds", {"refund_id": "r", "amount": 10})).json()
    order = {"order_id": "t", "wallet": wallet, "amount": 5, "currency": "CNY", "channel": "wechat", "method": "native"}
    topup = (await shop.post("/v1/topups", order)).json()
    endpoint = await shop.post("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/hook", "events": ["wallet.*"]})
    event = (await shop.get("/v1/events")).json()["data"][0]
    return {
        "payments": paid["id"],
        "topups": topup["id"],
        "refunds": refund["id"],
        "wallets": wallet,
        "events": event["id"],
        "webhook_endpoints": endpoint.json()["id"],
    }


def write_config(file: Path, house: House, things: dict[str, str]) -> None:
    """Tells schemathesis which ids exist. The route that deletes one keeps to names that do not."""
    lines: list[str] = []
    for route in house.api.routes:
        if "{id}" in route.pattern and route.method != "DELETE":
            name = things[route.pattern.split("/")[2]]
            lines += ["[[operations]]", f"include-name = {json.dumps(f'{route.method} {route.pattern}')}"]
            lines += ["[operations.parameters]", f'"path.id" = {json.dumps(name)}']
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "with_things", [True, pytest.param(False, marks=pytest.mark.long)], ids=["things-that-exist", "names-that-do-not"]
)
async def test_the_document_tells_the_truth(
    house: House, wechat_shop: Shop, sandbox: SandboxProcess, tmp_path: Path, with_things: bool
) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text("")
    which: tuple[str, ...] = ()
    if with_things:
        write_config(config, house, await things_of(wechat_shop))
    else:
        # The same seed sends the same to every other route as with things that exist.
        which = ("--include-path-regex", r"\{")

    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config),
        "run", f"{house.api.url}/openapi.json", "-H", f"Authorization: Bearer {wechat_shop.key}",
        "--request-timeout", "60", "--max-examples", EXAMPLES, "--seed", "20261123", "--generation-database", "none",
        "--suppress-health-check", "all", "--continue-on-failure", "--no-color", "--checks", ",".join(CHECKS),
        "--phases", "examples,coverage,fuzzing", *which, cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    told, _ = await asyncio.wait_for(process.communicate(), 500)

    assert process.returncode == 0, told.decode()[-6000:]


async def test_every_example_in_the_document_is_a_good_request(house: House, wechat_shop: Shop) -> None:
    things = await things_of(wechat_shop)
    for route in house.api.routes:
        if route.example is None or route.pattern.startswith("/v1/queues"):
            # Queues are an operator's: tests/flows/queues/test_operating.py asks with that key.
            continue
        path = route.pattern.replace("{id}", things.get(route.pattern.split("/")[2], ""))
        example = route.example | ({"wallet": things["wallets"]} if "wallet" in route.example else {})

        answer = await wechat_shop.http.request(
            route.method, path, json=example, headers={"Idempotency-Key": f"example-{route.method}-{route.pattern}"}
        )

        assert answer.status_code not in (400, 401, 403, 404, 415, 422, 500, 503), (path, answer.text)
