"""What a test reads in an HTML page, by the parser of the standard library."""
import re
from html.parser import HTMLParser

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}


class Page(HTMLParser):
    """Tags with their attributes, text, and tables by caption as rows of cells, their heads first."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.tables, self.open = [], [], {}, []
        self.feed(html)
        assert not self.open, f'not closed: {self.open}'
        self.text = ' '.join(' '.join(self.words).split())

    def of(self, *names):
        return [attributes for name, attributes in self.tags if name in names]

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == 'table':
            self.rows, self.caption = [], ''
        elif name == 'tr':
            self.rows.append([])
        elif name in ('th', 'td'):
            self.rows[-1].append('')

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name, name
        if name == 'table':
            assert self.caption and self.caption not in self.tables
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if 'style' in self.open:
            return
        self.words.append(data)
        if 'caption' in self.open:
            self.caption += data
        elif 'th' in self.open or 'td' in self.open:
            self.rows[-1][-1] = re.sub(r'\s+', ' ', self.rows[-1][-1] + data).strip()
