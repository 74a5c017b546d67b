"""Samplers that change what is good already: ageing evolution, and local search around the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from optuna.study import Study

from .population import Choices, Known, ProposalSampler, crowding, finished, losses, mutated, neighbours, ranks

TRIES = 20  # to find a change that no trial made yet


@dataclass(frozen=True)
class Evolution:
    """Regularised evolution: the best of a few young trials is changed in one choice; the old ones are forgotten.

    Real et al., Regularized evolution for image classifier architecture search (2019). With several objectives the
    best is the one of the lowest non-dominated rank, of these the one in the emptiest place.

    Attributes:
        population: the youngest finished trials, from which parents come; as many random ones begin.
        tournament: how many of them compete.
    """

    population: int
    tournament: int

    def __call__(self, study: Study, known: Known, rng: np.random.Generator) -> Choices:
        """Choices for the next trial; none where it should be random."""
        alive = finished(study)[-self.population :]
        if len(alive) < self.population:
            return {}
        rank = ranks(study, alive)
        room = crowding(losses(study, alive), rank)
        competing = rng.choice(len(alive), min(self.tournament, len(alive)), replace=False)
        parent = alive[min(competing, key=lambda place: (rank[place], -room[place]))]
        child: Choices = {}
        for _ in range(TRIES):
            child = mutated(parent.params, parent, rng)
            if child not in known:
                break
        return child


@dataclass(frozen=True)
class LocalSearch:
    """Pareto local search: all one-change neighbours of the front, unseen ones only, in random order.

    Paquete et al., Pareto local optimum sets in the biobjective traveling salesman problem (2004). Where all of them
    are known, two and more choices are changed.

    Attributes:
        starts: random trials to begin with.
    """

    starts: int

    def __call__(self, study: Study, known: Known, rng: np.random.Generator) -> Choices:
        """Choices for the next trial; none where it should be random."""
        done = finished(study)
        if len(done) < self.starts:
            return {}
        front = [trial for trial, rank in zip(done, ranks(study, done), strict=True) if rank == 0]
        fresh = [choices for trial in front for choices in neighbours(trial, rng) if choices not in known]
        if fresh:
            return fresh[rng.integers(len(fresh))]
        for changes in range(2, 2 + TRIES):
            for _ in range(TRIES):
                trial = front[rng.integers(len(front))]
                choices: Choices = trial.params
                for _ in range(changes):
                    choices = mutated(choices, trial, rng)
                if choices not in known:
                    return choices
        return {}


def evolution_sampler(seed: int, trials: int) -> ProposalSampler:
    """Ageing evolution for a budget of `trials`."""
    population = max(6, min(50, trials // 5))
    return ProposalSampler(Evolution(population, max(2, population // 4)), seed)


def local_sampler(seed: int, trials: int) -> ProposalSampler:
    """Pareto local search for a budget of `trials`."""
    return ProposalSampler(LocalSearch(max(4, min(20, trials // 5))), seed)
