"""Which requests are the demo's own page's: another site's page, in the same browser, may not reach the model."""

from __future__ import annotations

import ipaddress
import re
import socket
from email.message import Message
from http import HTTPStatus

__all__ = ["PAGE_HEADER", "Guard", "RefusedError", "is_loopback"]

# What the page sends with a POST. A browser asks the server before it lets another site's page send this header, and
# the server does not say yes.
PAGE_HEADER = "X-Dove-Fast"

# A name or an address, an IPv6 one in brackets, and perhaps a port.
AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", re.IGNORECASE)


class RefusedError(Exception):
    """An answer other than 200, with the message for the page."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """Refuses what does not come from the page of the server at `host`, whose socket is bound to `address`.

    Host must name this server: a site whose name leads to this machine's address (DNS rebinding) would pass for the
    page's own origin otherwise. Bound to this machine alone, the server's names are `host`, localhost and the loopback
    addresses; bound to others, the machine's name too, with and without .local, and any address: rebinding needs a
    name, and behind a container's network the server does not know the address that people use.
    The port may be any: through a tunnel it is not the server's, and an origin's is compared with Host's.
    """

    def __init__(self, host: str, address: str) -> None:
        self._local = is_loopback(address)
        names = {host, "localhost"}
        if not self._local:
            name = socket.gethostname()
            short = name.partition(".")[0]
            names |= {name, short, f"{short}.local"}
        # An address is judged as such, 0.0.0.0 too.
        self._names = {name.lower() for name in names if _address(name) is None}
        self._host = _address(host)

    def check(self, headers: Message) -> None:
        """Raise `RefusedError` unless Host names this server, and the page that asks, where one is named, is its own.

        A link from another site passes.
        """
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1 or not self._is_own(hosts[0].strip()):
            named = repr(hosts[0][:80]) if hosts else "nothing"
            message = f"the demo does not answer to {named}; open the address that it printed"
            raise RefusedError(HTTPStatus.MISDIRECTED_REQUEST, message)
        own = f"http://{hosts[0].strip()}".lower()
        if any(origin.strip().lower() != own for origin in headers.get_all("Origin", [])):
            raise _not_the_page()

    def check_call(self, method: str, headers: Message) -> None:
        """Raise `RefusedError`, once `check` has passed, for a call that another site's page makes."""
        # Browsers send it where the address is a loopback one, or https.
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise _not_the_page()
        if method == "POST" and not headers.get(PAGE_HEADER):
            raise RefusedError(HTTPStatus.FORBIDDEN, f"only the demo's own page may ask; it sends {PAGE_HEADER}")

    def _is_own(self, host: str) -> bool:
        found = AUTHORITY.fullmatch(host)
        if not found:
            return False
        address = _address(found[1] or found[2])
        if address is None:
            return found[2] is not None and found[2].lower() in self._names
        if address.is_unspecified:
            return False
        return address.is_loopback or address == self._host or not self._local


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches the address."""
    found = _address(address)
    return found is not None and found.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _not_the_page() -> RefusedError:
    return RefusedError(HTTPStatus.FORBIDDEN, "only the demo's own page may ask")
