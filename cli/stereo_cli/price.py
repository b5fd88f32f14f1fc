"""What a command would take, as `--dry-run` and `stereo doctor` print it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stereo_cli import terminal

if TYPE_CHECKING:
    from stereoclinic.calls.duration import Offer, Speed


def say_price(job: Any, offered: "Callable[[Any], tuple[Offer, Speed]]") -> None:
    """Time a few passes of a command that was checked, and print what it would take."""
    from dataclasses import asdict

    offer, speed = offered(job)
    price = offer.price
    terminal.say(f"it would take {words(asdict(offer))}")
    backward = f" and {price.backward:,} backward passes" if price.backward else ""
    each = f"; a backward pass takes {speed.backward:.2g} s" if price.backward and speed.measured else ""
    assumed = "; a backward pass was taken for two forward passes" * bool(price.backward and not speed.measured)
    terminal.say(
        f"counted: {price.forward:,} forward passes{backward} of one sample, where drawing as many images takes"
        f" {price.plain:,}; a forward pass takes {speed.forward:.2g} s here, {speed.batch} at a time{each}{assumed}"
    )


def words(offer: dict[str, Any]) -> str:
    """Time, memory and disk of an offer, and the option that would halve the time."""
    less = offer["halved"]
    return _price(offer["price"]) + (f"; with {offer['option']}: {_price(less)}" if less else "")


def _price(price: dict[str, Any]) -> str:
    memory, disk = size(price["memory"]), size(price["disk"])
    return f"{minutes(price['minutes'])}, {memory} of memory, {disk} on disk"


def minutes(number: float) -> str:
    """A time in words."""
    if number < 1:
        return "less than a minute"
    return f"about {number:.0f} minutes" if number < 120 else f"about {number / 60:,.0f} hours"


def size(number: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
