"""What can go wrong with a server: it cannot be had on this machine, or it was had and does not work."""


class ServerUnavailable(Exception):
    """A server cannot be had on this machine."""

    def __init__(self, name: str, why: str, *, fix: str) -> None:
        super().__init__(f"{name} cannot be had: {why} {fix}")
        self.name = name
        self.why = why
        self.fix = fix
        """What a person can do about it."""


class ServerFailed(Exception):
    """A server did not start, or did not do what it was told; the end of its log says why."""

    def __init__(self, name: str, what: str, *, log: str = "") -> None:
        super().__init__(f"{name} {what}" + (f"\n{log}" if log else ""))
        self.name = name
