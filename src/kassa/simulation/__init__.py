"""Whole lives of payments from a seed: the real service and rules on the memory journal, a virtual clock, a provider with
books of its own, and every fault that lies between them. What must always hold is checked after every commit."""

from kassa.simulation.command import main, simulate_all
from kassa.simulation.report import Report
from kassa.simulation.world import simulate

__all__ = ["Report", "main", "simulate", "simulate_all"]
