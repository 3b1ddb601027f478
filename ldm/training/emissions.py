"""What a run is taken to emit: hours x kilowatts x kilograms of CO2 a kilowatt-hour.

The arithmetic of Stable Diffusion v1's model card, after Lacoste et al. 2019, arXiv:1910.09700. The card's figures are 150,000
hours of one GPU, 250 W for each, and 0.30 kg of CO2 equivalent for each kilowatt-hour: 11,250 kg.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PowerRecipe:
    """What the machine is taken to draw (of several GPUs: one), and what a kilowatt-hour is taken to emit, in kg."""

    kilowatts: float = 0.25
    kg_per_kwh: float = 0.30


@dataclass(frozen=True, kw_only=True)
class Emissions:
    """Energy, and mass of CO2 equivalent."""

    kwh: float
    kg: float


def emissions(hours: float, power: PowerRecipe | None = None) -> Emissions:
    """Of so many hours; those of several GPUs add up. Raises ValueError for a number that is negative or not finite."""
    power = power or PowerRecipe()
    for name, value in (("hours", hours), ("kilowatts", power.kilowatts), ("kg a kWh", power.kg_per_kwh)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value:g}; expected 0 or more, and finite")
    kwh = hours * power.kilowatts
    kg = kwh * power.kg_per_kwh
    if kg == math.inf:
        raise ValueError(f"hours {hours:g}; expected a number whose product with {power.kilowatts:g} kW is finite")
    return Emissions(kwh=kwh, kg=kg)
