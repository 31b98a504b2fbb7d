"""Images that are listed in a table, with their labels and the groups they are in."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune._utils.files import user_path
from lightning_prune._utils.validation import check, check_path
from lightning_prune.classification.evaluation_data import PreparedData
from lightning_prune.errors import DataError

Row = dict[str, str]


class Listed(NamedTuple):
    """An image of a table.

    Attributes:
        path: Its file.
        label: The index of its class.
        group: The number of its group; None where there are no groups.
    """

    path: Path
    label: int
    group: int | None


class ListedImages(Dataset[Any]):
    """Images in the order of a table: (image, label), or a mapping with `image`, `label` and `group`.

    Args:
        items: The images.
        mode: "RGB" or "L".
        transform: From a PIL image to a tensor.
        class_to_idx: Name of a class -> its index.
        group_names: The groups in the order of their numbers; None without groups.

    Attributes:
        digest: Tells these images, labels and groups from others, without their pixels.
    """

    def __init__(
        self,
        items: Sequence[Listed],
        mode: str,
        transform: Callable[[Image.Image], Tensor],
        class_to_idx: Mapping[str, int],
        group_names: tuple[str, ...] | None = None,
    ) -> None:
        self.items, self.mode, self.transform = items, mode, transform
        self.class_to_idx, self.group_names = dict(class_to_idx), group_names
        listed = "\n".join(f"{item.path.name}\t{item.label}\t{item.group}" for item in items)
        self.digest = hashlib.sha256(listed.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        """An image with its label, and its group where there are groups."""
        item = self.items[index]
        try:
            with Image.open(item.path) as file:
                image = file.convert(self.mode)  # which decodes all of it
        except Exception as error:  # of damage PIL makes OSError, SyntaxError, ValueError, struct.error, ...
            reason = str(error) or type(error).__name__
            raise DataError(f"`root` must hold images that can be read, got {item.path}: {reason}") from error
        found = self.transform(image)
        return (found, item.label) if item.group is None else {"image": found, "label": item.label, "group": item.group}


class ImageTableData(PreparedData):
    """Images that a CSV file lists, with the preprocessing of the model; also with groups of images.

    Where `group` is given, the LightningModules of this package report the accuracy of each group and of the worst
    (`val/worst_group`), and so do the tables of `compare`. The table of Waterbirds has groups by class and background:
    `ImageTableData("waterbirds", image="img_filename", label="y", group=["y", "place"], where={"split": 2})`.

    Args:
        root: The folder that the paths in the table are relative to.
        table: The CSV file, with a line of column names; relative to `root` unless absolute.
        image: The column of the paths.
        label: The column of the labels: indices of the head, or names of classes.
        group: The column that tells the groups, or several, whose values together do; None for no groups.
        where: Column -> value that the rows to use have; None for all rows.
        classes: The names in the column of the labels, in the order of the head; by default labels are indices where
            all are whole numbers, else the names are sorted, and must be as many as the head has classes.
        batch_size: Number of images per batch.
        num_workers: Number of processes that load images; 0 loads in the main process. None for 4, or as many as there
            are usable cores where these are fewer.
        data_config: Entries of timm's data config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`. What is
            not given is taken from the attribute `data_config` of the LightningModule that the trainer runs.

    Attributes:
        group_names: The groups in the order of their numbers, such as `y=0,place=1`, after `setup`; None without.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: In `setup`: if the table, a column or an image does not exist, no row is left, a label is no class of
            the head, or no data config is known.

    Example:
        >>> from lightning_prune import ImageTableData
        >>> data = ImageTableData("waterbirds", image="img_filename", label="y", group=["y", "place"])
        >>> data.group
        ['y', 'place']
    """

    def __init__(
        self,
        root: str,
        table: str = "metadata.csv",
        image: str = "image",
        label: str = "label",
        group: str | list[str] | None = None,
        where: dict[str, Any] | None = None,
        classes: list[str] | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, data_config)
        for name, value in (("root", root), ("table", table)):
            check_path(name, value)
        for name, value in (("image", image), ("label", label)):
            check(name, value, "the name of a column", isinstance(value, str) and bool(value))
        columns = [group] if isinstance(group, str) else group
        check("group", group, "the name of a column, a list of them, or None", columns is None or _are_names(columns))
        check("where", where, "a mapping from columns to values or None", where is None or isinstance(where, Mapping))
        known = classes is None or (_are_names(classes) and len(set(classes)) == len(classes))
        check("classes", classes, "a list of different names or None", known)
        self.root, self.table = user_path(root), user_path(table)
        self.image, self.label, self.group, self.where = image, label, columns, dict(where or {})
        self.classes = classes
        self.group_names: tuple[str, ...] | None = None
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Reads the table and checks that it fits the model.

        Args:
            stage: "validate", "test", "predict" or "fit"; the data are the same.
        """
        config = self.prepare()
        everything = self._rows()
        rows = self._used(everything)
        classes = self._classes(everything)
        head = self.of_model("num_classes")
        outside = [name for name, index in classes.items() if index < 0 or (head is not None and index >= head)]
        if outside:
            known = "a class" if head is None else f"one of the {head} classes of the model's head"
            raise DataError(f"`label` must be {known}, got {outside[0]!r}.")
        is_guessed = self.classes is None and not _whole_numbers(classes)
        if is_guessed and head is not None and len(classes) != head:
            raise DataError(
                f"`classes` must name the {head} classes of the model's head in their order, as `label` has names and "
                f"the table {len(classes)} of them, got None."
            )
        groups = self._groups(rows)
        self.group_names = tuple(groups) or None
        items = [
            Listed(
                self.root / row[self.image], classes[row[self.label]], groups[self._group_of(row)] if groups else None
            )
            for row in rows
        ]
        missing = next((item.path for item in items if not item.path.is_file()), None)
        if missing is not None:
            raise DataError(f"`image` must name files in {self.root}, got {missing}, which does not exist.")
        mode = "L" if config["input_size"][0] == 1 else "RGB"
        transform = create_transform(**config, is_training=False)
        self.dataset = ListedImages(items, mode, transform, classes, self.group_names)

    @property
    def _path(self) -> Path:
        return self.root / self.table

    def _rows(self) -> list[Row]:
        """The rows of the table."""
        path = self._path
        if not path.is_file():
            raise DataError(f"`table` must be an existing CSV file, got {path}.")
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream, restval="")
                columns, read = list(reader.fieldnames or ()), list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"`table` must be a CSV file in UTF-8, got {path}: {error}") from error
        rows = [{column: value.strip() for column, value in row.items() if column is not None} for row in read]
        wanted = {"image": [self.image], "label": [self.label], "group": self.group or [], "where": list(self.where)}
        for argument, names in wanted.items():
            unknown = next((name for name in names if name not in columns), None)
            if unknown is not None:
                raise DataError(f"`{argument}` must be of the columns {', '.join(columns)} of {path}, got {unknown!r}.")
        return rows

    def _used(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that `where` leaves."""
        path = self._path
        used = [row for row in rows if all(row[column] == str(value) for column, value in self.where.items())]
        if not used:
            raise DataError(f"`where` must leave rows of {path}, which has {len(rows)}, got {self.where}.")
        needed = (self.image, self.label, *(self.group or ()))
        short = next((row for row in used if not all(row[column] for column in needed)), None)
        if short is not None:
            raise DataError(f"Each row of {path} must have {', '.join(map(repr, needed))}, got {short}.")
        return used

    def _classes(self, rows: Sequence[Row]) -> dict[str, int]:
        """Label as the table says it -> index of the class; of all rows, as a part may lack a class."""
        found = {row[self.label] for row in rows if row[self.label]}
        if self.classes is not None:
            indices = {name: index for index, name in enumerate(self.classes)}
            unknown = sorted(found - indices.keys())
            if unknown:
                raise DataError(f"`classes` must name all labels of the table, got none for {unknown[0]!r}.")
            return indices
        if _whole_numbers(found):
            return {label: int(float(label)) for label in sorted(found, key=float)}
        return {label: index for index, label in enumerate(sorted(found))}

    def _groups(self, rows: Sequence[Row]) -> dict[str, int]:
        """Name of a group -> its number; none without groups."""
        if self.group is None:
            return {}
        return {name: number for number, name in enumerate(sorted({self._group_of(row) for row in rows}))}

    def _group_of(self, row: Row) -> str:
        return ",".join(f"{column}={row[column]}" for column in self.group or ())


def _whole_numbers(labels: Iterable[str]) -> bool:
    """Whether all labels are whole numbers, also as `1.0`, which tools write where a column has gaps."""
    try:
        return all(float(label).is_integer() for label in labels)
    except ValueError:
        return False


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(each, str) and each for each in values)
