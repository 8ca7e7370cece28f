"""What an hour of audio costs: on rented machines, and beside services that are paid by the hour of audio.

    python benchmarks/cost.py --rtfx 60 --price 0.69 [--hours 100] [--cold-start 10 --jobs-per-wake 1]
    python benchmarks/cost.py --machine NAME:PRICE:RTFX ... --service NAME:PRICE ...

Prices are per hour of the machine, or per hour of audio at a service; they change, so none is
built in. RTFx is seconds of audio per second of work: a receipt has it, benchmarks/speed.py
measures it. A machine that is billed while it wakes and idles (--cold-start, --idle, seconds a
wake; --jobs-per-wake jobs of --job-seconds of audio each) costs more than its RTFx says.

The last line is JSON: ``hours``, and of each machine ``cost_per_audio_hour``, ``cost``,
``busy_share`` (of what is paid for) and ``break_even_hours``: hours of audio above which renting
by the month (--monthly) is cheaper than paying by the second.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from common import print_json, print_table

HOUR = 3600.0
MONTH_HOURS = 730.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Rented by the second while it works, wakes and idles."""

    name: str
    price_per_hour: float
    rtfx: float


@dataclass(frozen=True, slots=True)
class Wake:
    """What happens each time a worker is started; seconds, but for the number of jobs."""

    cold_start: float
    idle: float
    jobs: int
    job_audio: float

    def paid_seconds(self, rtfx: float) -> tuple[float, float]:
        """Seconds that are paid for, and those of them in which audio is worked on."""
        busy = self.jobs * self.job_audio / rtfx
        return busy + self.cold_start + self.idle, busy


@dataclass(frozen=True, slots=True)
class Bill:
    name: str
    cost_per_audio_hour: float
    busy_share: float
    break_even_hours: float
    """Hours of audio a month; infinite where one such machine could not work them off."""


def bill(machine: Machine, wake: Wake, monthly: float | None = None) -> Bill:
    """``monthly``: price of the same machine for a month; None takes the hourly price for all hours of it."""
    paid, busy = wake.paid_seconds(machine.rtfx)
    per_audio_hour = paid * machine.price_per_hour / (wake.jobs * wake.job_audio)
    always_on = MONTH_HOURS * machine.price_per_hour if monthly is None else monthly
    hours = always_on / per_audio_hour if per_audio_hour else float("inf")
    return Bill(
        machine.name,
        per_audio_hour,
        busy / paid,
        hours if hours <= MONTH_HOURS * machine.rtfx else float("inf"),
    )


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def not_negative(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text} is under 0")
    return number


def machine_of(text: str) -> Machine:
    name, price, rtfx = text.rsplit(":", 2)
    return Machine(name, not_negative(price), positive(rtfx))


def service_of(text: str) -> tuple[str, float]:
    name, price = text.rsplit(":", 1)
    return name, not_negative(price)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=machine_of, action="append", default=[], metavar="NAME:PRICE:RTFX")
    parser.add_argument("--price", type=not_negative, help="of one machine, per hour")
    parser.add_argument("--rtfx", type=positive, help="of that machine")
    parser.add_argument("--service", type=service_of, action="append", default=[], metavar="NAME:PRICE")
    parser.add_argument("--hours", type=positive, default=100.0, help="of audio a month (default 100)")
    parser.add_argument("--cold-start", type=not_negative, default=0.0, help="seconds paid for at each wake")
    parser.add_argument("--idle", type=not_negative, default=0.0, help="seconds a worker waits before it sleeps")
    parser.add_argument("--jobs-per-wake", type=int, default=1)
    parser.add_argument("--job-seconds", type=positive, default=HOUR, help="of audio in one job (default 3600)")
    parser.add_argument("--monthly", type=not_negative, help="price of the same machine for a whole month")
    arguments = parser.parse_args()
    machines = arguments.machine
    if arguments.price is not None and arguments.rtfx is not None:
        machines = [Machine("machine", arguments.price, arguments.rtfx), *machines]
    if not machines or arguments.jobs_per_wake < 1:
        parser.error("give --price and --rtfx, or --machine; and at least one job a wake")

    wake = Wake(arguments.cold_start, arguments.idle, arguments.jobs_per_wake, arguments.job_seconds)
    bills = [bill(machine, wake, arguments.monthly) for machine in machines]
    hours = arguments.hours
    rows: list[list[object]] = [
        [
            one.name,
            f"{one.cost_per_audio_hour:.4f}",
            one.cost_per_audio_hour * hours,
            f"{one.busy_share:.0%}",
            "never" if one.break_even_hours == float("inf") else f"{one.break_even_hours:.0f}",
        ]
        for one in bills
    ]
    rows += [[name, f"{price:.4f}", price * hours, None, None] for name, price in arguments.service]
    print_table(["", "per hour of audio", f"{hours:g} hours", "busy", "by the month from hours"], rows)
    print_json(
        {
            "hours": hours,
            "machines": {
                one.name: {
                    "cost_per_audio_hour": round(one.cost_per_audio_hour, 6),
                    "cost": round(one.cost_per_audio_hour * hours, 4),
                    "busy_share": round(one.busy_share, 4),
                    "break_even_hours": None
                    if one.break_even_hours == float("inf")
                    else round(one.break_even_hours, 1),
                }
                for one in bills
            },
            "services": {name: round(price * hours, 4) for name, price in arguments.service},
        }
    )


if __name__ == "__main__":
    main()
