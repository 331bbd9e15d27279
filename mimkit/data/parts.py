"""Choose the parts (splits) of a data set: which one is trained on, which one is evaluated on, which are left out."""

from collections.abc import Callable, Iterable
from typing import Any

from mimkit.errors import UserError, some

# Names of parts (splits) of a data set. Those that a network may be evaluated on stand in the order of preference.
TRAIN, VAL, TEST = ("train", "training"), ("val", "validation", "valid", "dev", "eval"), ("test", "testing")
UNLABELED, OTHER = ("unlabeled", "unlabelled", "unsupervised"), "other"  # OTHER: files beside parts that have names


def choose_parts(
    names: Iterable[str], wanted: list[str] | None = None, labeled: Callable[[str], bool] = lambda name: True
) -> tuple[list[str], str | None]:
    """Choose the parts of a data set to train on, and the part to evaluate on.

    The part named train is trained on. The validation part is evaluated on, and the test part only if there is no
    validation part with labels. Where neither has labels, the validation part is returned, which is then an error; a
    test part is not, since published ones often lack labels.

    Args:
        names: names of the parts, in any case. One such as train2017 counts too, unless there is a train.
        wanted: the parts that the user named. The others are not used.
        labeled: returns whether a part has labels, or masks or boxes.

    Returns:
        The parts to train on (none if there is no training part), and the part to evaluate on, or None.
    """
    pool = list(names) if wanted is None else wanted

    def named(roles: Iterable[str]) -> list[str]:
        exact = [name for role in roles for name in pool if name.lower() == role]
        return exact + [name for role in roles for name in pool if name not in exact and part_of(name) == role]

    validation = named(VAL)
    judges = [] if wanted and len(wanted) == 1 else validation + named(TEST)
    training = named(TRAIN)[:1] if wanted is None else [name for name in pool if name not in judges]
    judge = next(filter(labeled, judges), None) or next((name for name in judges if name in validation), None)
    return training, judge


def wanted_parts(data: str, found: Iterable[str], parts: str | None) -> list[str] | None:
    """Return the parts that `--parts` names, None without it.

    Raises:
        UserError: the data set does not have one of them.
    """
    if parts is None:
        return None
    by_name = {("train" if name.lower() in TRAIN else name.lower()): name for name in found}
    by_name |= {name.lower(): name for name in found}
    wanted = list(dict.fromkeys(name.strip().lower() for name in parts.split(",")))
    if unknown := [name for name in wanted if name not in by_name]:
        raise UserError(
            f"--parts {parts[:100]}: {data} has no part {unknown[0][:40] or 'without a name'}. Choose from "
            f"{some(found, 6)}."
        )
    return list(dict.fromkeys(by_name[name] for name in wanted))


def no_columns(data: str, image_column: str | None, label_column: str | None) -> None:
    """Refuse names of columns for a data set that is not a table.

    Raises:
        UserError: there is a name of a column.
    """
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column:
            raise UserError(f"{flag} {column} names a column of a table, and --data {data} is a folder. Leave it out.")


def part_of(path: str) -> str:
    """Return the part that a path names, such as train for train-00.parquet or val for val/x.tar; "" for none."""
    words = "".join(c if c.isalpha() else " " for c in path.lower()).split()
    found = next((name for name in (*UNLABELED, *TRAIN, *VAL, *TEST) if name in words), "")
    return TRAIN[0] if found in TRAIN else found


def describe(*groups: tuple[str, dict[str, Any]]) -> str:
    """Describe parts of a data set and their numbers of images: "Training images: train (24). Left out: test (7)."."""

    def show(name: str, count: Any) -> str:
        return f"{name} ({count:,})" if isinstance(count, int) else f"{name} ({count})"

    return " ".join(f"{title}: {', '.join(map(show, parts, parts.values()))}." for title, parts in groups if parts)
