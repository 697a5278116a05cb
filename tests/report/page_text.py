"""What a page says, and what it would load, read with the standard library."""

import html.parser


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps tags, ids and text."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> does not nest"

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}:
            self.words.append(data)


def text_of(path):
    return " ".join(Page(path.read_text(encoding="utf-8")).words)
