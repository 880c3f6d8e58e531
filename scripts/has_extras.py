"""Exit with 0 if the package is installed here with the extras named as arguments, each in a version that it allows."""

import sys
from importlib.metadata import PackageNotFoundError, distribution, version

try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit(1)


def is_wanted(requirement: Requirement) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *sys.argv[1:]])


def is_met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


try:
    requirements = [Requirement(line) for line in distribution("llava-scissor").requires or []]
except PackageNotFoundError:
    sys.exit(1)
sys.exit(not all(is_met(requirement) for requirement in requirements if is_wanted(requirement)))
