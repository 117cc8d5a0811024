"""What is predicted: labels, outputs, head, and how outputs become probabilities.

The only place that knows how many labels and outputs there are.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.models import is_model, model_entrypoint

__all__ = [
    'DIAGNOSES', 'HEADS', 'ISIC2017', 'KINDS', 'LABELS', 'OFFICIAL_THRESHOLD', 'TASKS', 'DataError', 'Task',
    'balancing_weights', 'calibrate', 'check_label', 'label_words', 'probabilities_of', 'words_list',
]

OFFICIAL_THRESHOLD = 0.5  # the challenge's scorer calls an image positive strictly above it
KINDS = ('multilabel', 'multiclass')
HEADS = ('sigmoid', 'softmax')
RESERVED = {  # other columns of tables, and other keys of metrics.json
    'accuracy', 'balanced_accuracy', 'brier', 'comparison', 'confusion_matrix', 'error', 'external', 'first', 'group',
    'groups', 'image', 'image_id', 'intervals_over', 'labels', 'mask', 'mean_auc', 'mean_auc_ci95', 'most_probable',
    'second', 'split', 'subgroups', 'top1'}
NONE = 'none'


class DataError(ValueError):
    """Data or labels that cannot be used; the message names what is wrong and what to do."""


def check_label(label: str) -> None:
    """Refuse a label that cannot be a column, part of a file name or a key of metrics.json.

    Raises:
        DataError: Such a label.
    """
    if (not isinstance(label, str) or label != label.strip() or not label.strip('.') or len(label) > 80
            or any(c in '/\\,=<>&"`|{}$' or ord(c) < 32 for c in label)):
        raise DataError(f'{label!r} is no usable label: it must be a word of at most 80 characters, without any of '
                        f'/ \\ , = < > & " ` | {{ }} $. Rename it, or say in a --task FILE.yaml which label such a '
                        f'word of the data means.')
    if label in RESERVED:
        raise DataError(f'{label} cannot be a label, since a column of the tables is called so: rename it.')


def label_words(label: str) -> str:
    """A label as a reader knows it: 'seborrheic keratosis'."""
    return label.replace('_', ' ')


def words_list(labels: Sequence[str]) -> str:
    """Labels as a reader knows them: 'melanoma, nevus and scar'."""
    *first, last = map(label_words, labels)
    return f'{", ".join(first)} and {last}' if first else last


@dataclass(frozen=True)
class Task:
    """What is predicted of an image.

    Attributes:
        name: 'isic2017' for one.
        labels: What gets a probability and scores, in the order of all arrays.
        kind: 'multilabel': each label is there or not. 'multiclass': an image has one of the labels.
        rest: What an image with none of the labels is called, or ''. A multiclass network has no output for it.
        exclusive: Whether an image has one label at most; always so in a multiclass task.
        head: 'sigmoid': an output for each label. 'softmax': an output for each of the classes. '': as the kind says.
        aim: The score that the challenge ranks by, 'mean_auc' or 'balanced_accuracy'.
        title: As a reader knows it; '' for the name.
        column: Column of the data that names the class of each image; '': a column of 0 and 1 for each label.
        aliases: Pairs of another word in that column, and the label it means.
    """
    name: str
    labels: Tuple[str, ...]
    kind: str = 'multilabel'
    rest: str = ''
    exclusive: bool = False
    head: str = ''
    aim: str = 'mean_auc'
    title: str = ''
    column: str = ''
    aliases: Tuple[Tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f'The kind of a task is {" or ".join(KINDS)}, not {self.kind!r}.')
        multiclass = self.kind == 'multiclass'
        fill = object.__setattr__  # of a frozen class
        fill(self, 'labels', tuple(self.labels))
        fill(self, 'aliases', tuple((str(word), str(label)) for word, label in self.aliases))
        fill(self, 'exclusive', self.exclusive or multiclass or len(self.labels) == 1)
        fill(self, 'head', self.head or ('softmax' if multiclass else 'sigmoid'))
        fill(self, 'title', self.title or self.name)
        if len(self.labels) < 1 + multiclass:
            raise DataError(f'A {self.kind} task needs at least {1 + multiclass} labels, but has '
                            f'{", ".join(self.labels) or "none"}'
                            + (': add images of another diagnosis.' if self.labels else '.'))
        names = [*self.classes, *[self.rest] * bool(multiclass and self.rest)]
        for label in names:
            check_label(label)
        twice = sorted({label for label in names if names.count(label) > 1})
        if twice:
            raise DataError(f'The label {twice[0]} is named twice: give each label once.')
        if self.head not in HEADS:
            raise DataError(f'A head is {" or ".join(HEADS)}, not {self.head!r}.')
        if self.is_softmax and not self.exclusive:
            raise DataError('--head softmax needs images with one label at most, but these may have several: choose '
                            'sigmoid.')
        meaning: Dict[str, str] = {}
        for word, label in (*self.aliases, *zip(self.classes, self.classes)):
            other = meaning.setdefault(word, label)
            if other != label:
                raise DataError(f'The word {word} stands for {other} and for {label}: give it to one label.')
        unknown = sorted({label for _, label in self.aliases} - set(self.classes))
        if unknown:
            raise DataError(f'A word stands for {unknown[0]}, which is no label: choose {", ".join(self.classes)}.')

    @property
    def is_challenge(self) -> bool:
        """Whether it is that of an ISIC challenge, whose official threshold is 0.5."""
        return self.name in TASKS and self.name.startswith('isic')

    @property
    def usual_point(self) -> str:
        """What readers call the threshold that was not chosen: 'official' in a challenge."""
        return 'official' if self.is_challenge else f'{OFFICIAL_THRESHOLD:g}'

    @property
    def is_softmax(self) -> bool:
        """Whether the outputs are a softmax over the classes, and not a sigmoid for each label."""
        return self.head == 'softmax'

    @property
    def classes(self) -> Tuple[str, ...]:
        """What an image can be: the labels and, in a multilabel task, first the rest."""
        return self.labels if self.kind == 'multiclass' else (self.rest or NONE, *self.labels)

    @property
    def known(self) -> Tuple[str, ...]:
        """Names of what a network has learned to tell apart, labels first."""
        return (*self.labels, *[self.rest] * bool(self.rest and self.kind == 'multilabel'))

    @property
    def outputs(self) -> Tuple[str, ...]:
        """Names of the outputs of a network."""
        return self.classes if self.is_softmax else self.labels

    def with_head(self, head: Optional[str]) -> 'Task':
        """The same with another head; as it is for None.

        Raises:
            DataError: A softmax over labels of which an image may have several.
        """
        return dataclasses.replace(self, head=head or self.head)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the labels, float32 (B, labels), of logits (B, outputs)."""
        if self.is_softmax:
            return logits.float().softmax(1)[:, len(self.outputs) - len(self.labels):]
        return logits.float().sigmoid()

    def class_numbers(self, labels: Any) -> Any:
        """Numbers in classes, shape (N,), of labels of shape (N, labels) of which one at most is 1; -1 for the rest of
        a multiclass task. NumPy or PyTorch, as given."""
        first = len(self.classes) - len(self.labels)
        if isinstance(labels, torch.Tensor):
            numbers = torch.arange(first, len(self.classes), device=labels.device, dtype=labels.dtype)
            found = (labels @ numbers).long()
            return found if first else torch.where(labels.sum(1) > 0, found, -1)
        labels = np.asarray(labels)
        found = (labels @ np.arange(first, len(self.classes))).astype(int)
        return found if first else np.where(labels.sum(1) > 0, found, -1)

    def strata(self, labels: Any) -> np.ndarray:
        """By which data are balanced and divided: the class of each image or, where it may have several labels, the
        number in classes of its rarest.

        Args:
            labels: Shape (N, labels), of all images that are balanced or divided.
        """
        labels = np.asarray(labels)
        if self.exclusive:
            return self.class_numbers(labels)
        rarest = np.where(labels > 0, labels.sum(0), np.inf).argmin(1) + 1
        return np.where((labels > 0).any(1), rarest, 0)

    def image_weights(self, labels: Any, weights: Any) -> Any:
        """The weight of each image, shape (N,): of its class or, of several labels, the largest.

        Args:
            labels: Shape (N, labels); NumPy or PyTorch.
            weights: Of classes, of the same library.
        """
        if self.exclusive:
            return weights[self.class_numbers(labels)]
        library: Any = torch if isinstance(labels, torch.Tensor) else np
        return library.where((labels > 0).any(1), library.amax((labels > 0) * weights[1:], 1), weights[0])

    def diagnosis(self, labels: Any) -> str:
        """What one image has, in words: 'melanoma', 'nevus' where it has none of the labels, 'scar and ulcer'.

        Args:
            labels: Shape (labels,).
        """
        found = [label_words(label) for label, value in zip(self.labels, labels) if value > 0]
        return ' and '.join(found) or label_words(self.rest) or 'none of the labels'

    def to_json(self) -> Dict[str, Any]:
        """What config.json keeps of it beside label_names, under the key task."""
        return {'name': self.name, 'title': self.title, 'kind': self.kind, 'labels': list(self.labels),
                'rest': self.rest, 'exclusive': self.exclusive, 'head': self.head, 'aim': self.aim}

    def config(self) -> Optional[Dict[str, Any]]:
        """to_json, but None for ISIC 2017, whose config.json says all by its label_names."""
        return None if self.name == ISIC2017.name else self.to_json()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> 'Task':
        """Of what to_json gave.

        Raises:
            DataError: Something else.
        """
        try:
            return cls(**{**content, 'labels': tuple(content['labels'])})
        except (KeyError, TypeError) as error:
            raise DataError(f'The task of a config.json is damaged: {error}.') from error

    @classmethod
    def of_config(
            cls,
            config: Mapping[str, Any],
            outputs: int,
            label_names: Sequence[str] = (),
    ) -> Optional['Task']:
        """The task of a network, or None where its config does not tell, or tells another number of outputs.

        Args:
            config: Content of its config.json, or the metadata of its ONNX file; may be empty.
            outputs: Number of its outputs.
            label_names: Names of its outputs where config has none.
        """
        found: Optional[Task] = None
        if config.get('task'):
            try:
                found = cls.from_json(config['task'])
            except DataError:
                return None
        else:
            names = tuple(config.get('label_names') or label_names)
            found = next((task for task in map(ISIC2017.with_head, HEADS) if task.outputs == names), None)
        return found if found and len(found.outputs) == outputs else None

    @classmethod
    def of_network(cls, model: Any, config: Mapping[str, Any] = {}) -> Optional['Task']:  # noqa: B006  # is not changed
        """The task of a timm model, or None, as of_config; of an architecture of this package ISIC 2017 where no config
        names its outputs, which `assumption` then says.

        Args:
            model: It.
            config: Content of the config.json that it was loaded from, if it was.
        """
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        own = _is_own(cfg.get('architecture') or '')
        return cls.of_config(config, model.num_classes, cfg.get('label_names') or (LABELS if own else ()))

    def assumption(self, name: str, model: Any, config: Mapping[str, Any] = {}) -> str:  # noqa: B006  # is not changed
        """What a user should know of a model whose outputs no config names; '' where one does.

        Args:
            name: As the user calls the model.
            model, config: As for of_network, which gave this task.
        """
        if config.get('task') or config.get('label_names') or (model.pretrained_cfg or {}).get('label_names'):
            return ''
        return (f'The outputs of {name} are taken for {words_list(self.outputs)}, because its config.json has no '
                f'label_names.')


def _is_own(architecture: str) -> bool:
    """Whether this package has registered a timm architecture."""
    package = __name__.partition('.')[0]
    return is_model(architecture) and model_entrypoint(architecture).__module__.partition('.')[0] == package


ISIC2017 = Task('isic2017', ('melanoma', 'seborrheic_keratosis'), rest='nevus', exclusive=True,
                title='ISIC 2017 Part 3')
LABELS, DIAGNOSES = ISIC2017.labels, ISIC2017.classes

TASKS = {task.name: task for task in (
    ISIC2017,
    Task('isic2018', ('MEL', 'NV', 'BCC', 'AKIEC', 'BKL', 'DF', 'VASC'), 'multiclass', aim='balanced_accuracy',
         title='ISIC 2018 Task 3'),
    Task('isic2019', ('MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC'), 'multiclass', 'UNK',
         aim='balanced_accuracy', title='ISIC 2019'),
    Task('isic2020', ('malignant',), rest='benign', title='ISIC 2020'),
    Task('isic2024', ('malignant',), rest='benign', title='ISIC 2024'),
    Task('ham10000', ('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc'), 'multiclass', title='HAM10000', column='dx'),
)}


def balancing_weights(labels: Union[np.ndarray, torch.Tensor], task: Task = ISIC2017) -> np.ndarray:
    """A weight for each class by which all that occur count the same, with a mean of 1 over the images.

    Args:
        labels: Shape (N, labels).
        task: Theirs.
    """
    counts = np.bincount(task.strata(labels), minlength=len(task.classes))
    return counts.sum() / np.maximum(counts, 1) / (counts > 0).sum()


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """Of ISIC 2017: probabilities of LABELS (B, 2), float32, from logits of LABELS (B, 2), or of DIAGNOSES (B, 3)."""
    return ISIC2017.with_head(HEADS[logits.shape[1] == len(DIAGNOSES)]).probabilities(logits)


def calibrate(probabilities: Any, temperature: Any, bias: Any = 0.) -> np.ndarray:
    """sigmoid(logit(p) / T + b) in float64, which keeps the order.

    Args:
        probabilities: Of any shape that the others broadcast to.
        temperature: T, above 0.
        bias: b.
    """
    p = np.clip(np.asarray(probabilities, np.float64), 1e-12, 1 - 1e-12)
    yes, no = p ** (1 / temperature) * np.exp(bias), (1 - p) ** (1 / temperature)
    return yes / (yes + no)
