"""tableN.csv and tableN.md."""
import re
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

from ...files import read_rows, replacing, write_rows
from ...isic.report import markdown_table
from ...isic.task import LABELS, label_words
from .rows import MASKS, TITLES
from .rows import TABLES as SCORED

__all__ = ['COLUMNS', 'WITHOUT_DUPLICATES', 'cell', 'differences', 'markdown_page', 'write_table']

COLUMNS = ('row', 'label', 'printed', 'measured', 'ci_low', 'ci_high', 'seeds', 'images', 'image_size', 'epochs',
           'precision', 'kernels', 'commit', 'command', 'note')
WITHOUT_DUPLICATES = '_without_duplicates'  # ends the names of tables of fewer test images
ANY = '\0'
SETTINGS = ('images', 'image_size', 'epochs', 'precision', 'kernels', 'commit')


def cell(
        row: str,
        label: str,
        printed: Optional[float] = None,
        figure: Optional[Tuple[float, ...]] = None,
        note: str = '',
        **settings,
) -> Dict[str, str]:
    """A line of tableN.csv.

    Args:
        row: Row's name.
        label: What the figure is.
        printed: The paper's figure, if it prints one.
        figure: The measured one, alone or with its interval; None where there is none.
        note: Why there is none, or a remark.
        **settings: The other columns.
    """
    measured = [f'{value:.8f}' for value in figure or ()]
    line = dict.fromkeys(COLUMNS, '')
    line.update(row=row, label=label, printed='' if printed is None else f'{printed:g}', note=note,
                **dict(zip(('measured', 'ci_low', 'ci_high'), measured)), **{k: str(v) for k, v in settings.items()})
    return line


def differences(path: Path, lines: List[Dict[str, str]], about: Dict[str, str], images: str) -> List[str]:
    """What a written tableN.csv, and its tableN.md, say otherwise than lines that were computed again.

    Args:
        path: The CSV.
        lines: Of cell(). Commands and notes are not compared.
        about: As for write_table.
        images: As for write_table.

    Raises:
        OSError: No such file.
        ValueError: It is not a CSV.
    """
    def key(line: Dict[str, str]) -> Tuple[str, str]:
        return line.get('row', ''), line.get('label', '')

    rows = read_rows(path)
    written = {key(line): line for line in rows}
    times = Counter(map(key, rows))
    found = [f'{" ".join(name)}: {count} lines' for name, count in times.items() if count > 1]
    for line in lines:
        there = written.pop(key(line), None)
        if there is None:
            found.append(f'{" ".join(key(line))}: not in the table')
            continue
        for column in ('printed', 'measured', 'ci_low', 'ci_high', 'seeds', *SETTINGS):
            if there.get(column) != line[column]:
                found.append(f'{" ".join(key(line))}: {column} is {there.get(column) or "empty"}, computed again it is '
                             f'{line[column] or "empty"}')
    found += [f'{" ".join(name)}: in the table, but it is none of its rows' for name in written]
    page = path.with_suffix('.md')
    # what the reader's copy of the images is called, and how large they are, is not compared
    known = re.escape(markdown_page(path.stem, rows, about, ANY * bool(images))).replace(re.escape(ANY), '.+')
    if not found and not re.fullmatch(known, page.read_text(encoding='utf-8')):
        found.append(f'{page} is not the page of {path.name}')
    return found


def write_table(
        out: Path,
        table: str,
        lines: List[Dict[str, str]],
        about: Dict[str, str],
        images: str = '',
) -> None:
    """Write tableN.csv and tableN.md.

    Args:
        out: Folder.
        table: Name of its files.
        lines: Of cell().
        about: What each row is, by its name.
        images: What a reader must know of the images, '' where none were measured on.
    """
    write_rows(out / f'{table}.csv', lines, COLUMNS)
    with replacing(out / f'{table}.md') as temporary:
        temporary.write_text(markdown_page(table, lines, about, images), encoding='utf-8')


def _text(line: Optional[Dict[str, str]], sign: bool = False) -> str:
    if line is None or not (line['measured'] or line['printed']):
        return ''
    plus = '+' if sign else ''
    text = ''
    if line['measured']:
        digits = 3 if line['ci_low'] else 4
        text = f'{float(line["measured"]):{plus}.{digits}f}'
    if line['ci_low']:
        text += f' [{float(line["ci_low"]):{plus}.3f}, {float(line["ci_high"]):{plus}.3f}]'
    printed = f'printed {line["printed"]}' if line['printed'] else ''
    return f'{text} ({printed})' if text and printed else text or printed


def _common(lines: Iterable[Dict[str, str]], column: str) -> str:
    values = [line[column] for line in lines if line[column]]
    if column in ('kernels', 'commit'):  # several where the seeds of a row, or both rows of a difference, have others
        values = ' '.join(values).split()
    return ', '.join(dict.fromkeys(values))


def markdown_page(table: str, lines: List[Dict[str, str]], about: Dict[str, str], images: str) -> str:
    """The table as Markdown: figures, paired differences, what is missing and why, and the commands."""
    table = table.removesuffix(WITHOUT_DUPLICATES)
    by_row: Dict[str, Dict[str, Dict[str, str]]] = {}
    for line in lines:
        by_row.setdefault(line['row'], {})[line['label']] = line
    masks = by_row.pop(MASKS, {})
    lines = [line for line in lines if line['row'] != MASKS]
    labels = list(dict.fromkeys(line['label'] for line in lines))
    names = [name for name in by_row if ' - ' not in name]
    pairs = [name for name in by_row if ' - ' in name and any(map(_text, by_row[name].values()))]
    measured = [line for line in lines if line['measured']]
    parts = [f'# {TITLES[table]}']
    alone = any(line['ci_low'] and line['seeds'].isdigit() for line in measured)
    over = f'with 95 % intervals over images and seeds (bootstrap{", of images alone for one seed" * alone})'
    if table in SCORED and measured:
        parts.append(
            f'Measured on the {_common(measured, "images")} test images of {images}, by networks that see '
            f'{_common(measured, "image_size")} px: AUC'
            + ', and accuracy, sensitivity and specificity at the threshold 0.5' * any('accuracy' in k for k in labels)
            + f'. Means of the seeds {_common(measured, "seeds")}, {over}; {_common(measured, "epochs")} epochs, '
            f'precision {_common(measured, "precision")}, gate by {_common(measured, "kernels")} kernels, commit '
            f'{_common(measured, "commit")}. Figures of the paper are as printed; its images are larger and its '
            f'training is longer.')
    elif images and _common(measured, 'seeds'):
        split, how = (('test', '95 % intervals of the paired t-test over the seeds') if table == 'table7' else
                      ('validation', 'Means of the seeds'))
        with_intervals = f', {over}' * (table == 'maps')
        parts.append(f'Measured on the {split} images of {images}, by networks that see '
                     f'{_common(measured, "image_size")} px. {how} {_common(measured, "seeds")}{with_intervals}; '
                     f'{_common(measured, "epochs")} epochs, precision {_common(measured, "precision")}, commit '
                     f'{_common(measured, "commit")}.')
    if masks:
        parts.append(
            f'Lesion masks of test: by a DeepLabV3+ trained on those of train, with a Dice of {_text(masks["dice"])} '
            f'and an IoU of {_text(masks["iou"])} on {masks["dice"]["images"]} validation images.')

    def words(label: str) -> str:
        name = label.partition(' ')[0]
        return label.replace(name, label_words(name)) if name in LABELS else label

    groups = [labels]
    if table in SCORED:
        groups = [[k for k in labels if ' ' not in k]] + [
            [k for k in labels if k.startswith(f'{label} ')] for label in LABELS]
    if table != 'table7':
        for group in filter(None, groups):
            parts.append(markdown_table(
                ['row', 'what it is', *map(words, group)],
                [[name, about.get(name.partition(' ')[0], ''), *(_text(by_row[name].get(label)) for label in group)]
                 for name in names]))
    else:
        parts.append(markdown_table(
            ['row', 'what it is', 'figure', 'measured'],
            [[name, about.get(name, ''), label, _text(line)] for name in names for label, line in by_row[name].items()
             if _text(line)]))
    if pairs:
        parts += ['Differences, paired on the same images and seeds:', markdown_table(
            ['rows', *map(words, groups[0])],
            [[name, *(_text(by_row[name].get(label), sign=True) for label in groups[0])] for name in pairs])]
    notes: Dict[str, List[str]] = {}
    for name in names:
        for note in dict.fromkeys(line['note'] for line in by_row[name].values() if line['note']):
            notes.setdefault(note, []).append(name)
    if notes:
        parts += ['## Notes', '\n'.join(f'- {", ".join(of)}: {note}' for note, of in notes.items())]
    commands = list(dict.fromkeys(line['command'] for line in measured if line['command'] and ' - ' not in line['row']))
    if commands:
        parts += ['## Commands', '```bash\n' + '\n'.join(commands) + '\n```']
    return '\n\n'.join(parts) + '\n'
