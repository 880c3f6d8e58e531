"""What `eval.run` hands to `eval.worker`: a JSON object that says which experiment, and what of it is left to do.

Keys: `config` and `overrides` as for `llava.config.load_experiment`; optionally `variants`, lists of further overrides,
each of which adds its settings, so that one process evaluates methods with different options.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llava.config import Experiment, load_experiment


def experiment_of(job: Mapping[str, Any]) -> Experiment:
    """The experiment of a job, with the settings of all its variants, each of them once.

    Raises:
        ConfigError: as `load_experiment` does.
    """
    config, overrides = job["config"], job["overrides"]
    if not job.get("variants"):
        return load_experiment(config, overrides)
    variants = [load_experiment(config, [*overrides, *variant]) for variant in job["variants"]]
    settings = dict.fromkeys(setting for variant in variants for setting in variant.compressions)
    return dataclasses.replace(variants[0], compressions=tuple(settings))
