"""A user of RocketMQ who may look at topics, and has no other right."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.rocketmq_house import new_topic, open_transport
from kassa.db import embedded
from kassa.errors import SettingInvalid
from servers import RocketMQ

pytestmark = [pytest.mark.needs("rocketmq"), pytest.mark.long]
"""A server of its own, for one claim."""

OWNER, READER = "owner", "reader"
AUTH = "org.apache.rocketmq.auth"
SETTINGS = f"""
authenticationEnabled=true
authenticationProvider={AUTH}.authentication.provider.DefaultAuthenticationProvider
authenticationMetadataProvider={AUTH}.authentication.provider.LocalAuthenticationMetadataProvider
authorizationEnabled=true
authorizationProvider={AUTH}.authorization.provider.DefaultAuthorizationProvider
authorizationMetadataProvider={AUTH}.authorization.provider.LocalAuthorizationMetadataProvider
"""
CREATE_USER, CREATE_ACL = 3001, 3006


class OwnRocketMQ(RocketMQ):
    """Whose broker does what somebody has a right to. Its owner may do everything."""

    def url_of(self, user: str) -> str:
        return self.url.replace("://", f"://{user}:{self.password}@")

    def allow_to_look(self, user: str) -> None:
        """At every topic."""
        one = {"username": user, "password": self.password, "userType": "Normal", "userStatus": "enable"}
        self._tell_broker(CREATE_USER, {"username": user}, json.dumps(one).encode())
        right = {"resource": "Topic:*", "actions": ["Get"], "sourceIps": [], "decision": "Allow"}
        acl = {"subject": f"User:{user}", "policies": [{"policyType": "Custom", "entries": [right]}]}
        self._tell_broker(CREATE_ACL, {"subject": f"User:{user}"}, json.dumps(acl).encode())

    def _configure(self) -> tuple[Path, Path, Path]:
        name_server, broker, proxy = super()._configure()
        first = json.dumps({"username": OWNER, "password": self.password})
        ours = json.dumps({"accessKey": OWNER, "secretKey": self.password})
        told = f"initAuthenticationUser={first}\ninnerClientAuthenticationCredentials={ours}\n"
        return name_server, self._write("conf/broker.conf", broker.read_text() + SETTINGS + told), proxy

    def _tell_broker(self, code: int, fields: dict[str, str], body: bytes = b"") -> None:
        """Signed. Source: RocketMQ 5.5.0, acl/common/AclUtils."""
        told = fields | {"AccessKey": OWNER}
        signed = "".join(told[name] for name in sorted(told)).encode() + body
        signature = base64.b64encode(hmac.new(self.password.encode(), signed, hashlib.sha1).digest()).decode()
        super()._tell_broker(code, told | {"Signature": signature}, body)


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnRocketMQ]:
    with embedded.temporary_directory("kassa-rocketmq-") as directory:
        server = OwnRocketMQ(directory / "rocketmq")
        try:
            yield server.start()
        finally:
            server.kill()


async def test_verifying_needs_no_right_but_to_look(own_server: OwnRocketMQ) -> None:
    topic, missing = new_topic(), new_topic()
    async with open_transport(own_server.url_of(OWNER)) as owner:
        await owner.provision([topic], verify_only=False)
    own_server.allow_to_look(READER)

    async with open_transport(own_server.url_of(READER)) as reader:
        assert await reader.provision([topic], verify_only=True) == []
        books = topic._replace(groups=("shop", "books"))
        assert await reader.provision([books], verify_only=True) == [(topic.name, "books")]
        assert await reader.provision([missing], verify_only=True) == [(missing.name, "shop")]
        with pytest.raises(SettingInvalid, match="no permission"):
            await reader.provision([missing], verify_only=False)


async def test_who_is_not_known_may_not_even_look(own_server: OwnRocketMQ) -> None:
    """The right of the test above is what it says."""
    for url in (own_server.url, own_server.url_of("stranger")):
        async with open_transport(url) as transport:
            with pytest.raises(SettingInvalid, match="refuses us"):
                await transport.provision([new_topic()], verify_only=True)
