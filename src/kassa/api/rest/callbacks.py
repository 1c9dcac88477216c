"""What channels tell us. The provider's signature is the authentication; it is checked where the channel is known."""

from kassa.api.http import Request, Response
from kassa.api.route import Answer, Route
from kassa.errors import ChannelMessageInvalid, ChannelNotFound, MerchantNotFound
from kassa.ids import read_id
from kassa.merchants.directory import Directory
from kassa.payments.service import Payments

JSON = "application/json"


def routes(payments: Payments, directory: Directory) -> list[Route]:
    """The one door for all channels and merchants."""

    async def callback(request: Request) -> Response:
        merchant_id = read_id("mch_", request.params["merchant"])
        home = None if merchant_id is None else await directory.home_of(merchant_id)
        if home is None:
            raise MerchantNotFound
        answer = await payments.handle_callback(home, request.params["channel"], request.headers, request.body)
        headers = tuple((name, value) for name, value in answer.headers.items() if name.lower() != "content-type")
        kind = next((value for name, value in answer.headers.items() if name.lower() == "content-type"), JSON)
        return Response(answer.status, answer.body, headers, kind)

    return [
        Route(
            "POST", "/v1/callbacks/{channel}/{merchant}", "What a channel tells us; signed by its provider.", callback,
            {200: Answer(JSON, "Taken, as the provider wants to hear it"),
             204: Answer(None, "Taken"),
             500: Answer(JSON, "Not taken: the provider shall send it again")},
            body=JSON, problems=(ChannelNotFound, MerchantNotFound, ChannelMessageInvalid),
        ),
    ]  # fmt: skip
