"""The page's Markdown, in a browser: what becomes of a text, and that streaming it makes no difference."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from browser import Browser, Page
from fake_api import FakeApi

CASES = {
    # Examples of the CommonMark specification, and of GitHub's tables
    "**foo bar**": "<p><strong>foo bar</strong></p>",
    "a * foo bar*": "<p>a * foo bar*</p>",
    'a*"foo"*': '<p>a*"foo"*</p>',
    "foo*bar*": "<p>foo<em>bar</em></p>",
    "foo_bar_baz": "<p>foo_bar_baz</p>",
    "__foo, __bar__, baz__": "<p><strong>foo, <strong>bar</strong>, baz</strong></p>",
    "*foo**bar**baz*": "<p><em>foo<strong>bar</strong>baz</em></p>",
    "***foo** bar*": "<p><em><strong>foo</strong> bar</em></p>",
    "*foo *bar**": "<p><em>foo <em>bar</em></em></p>",
    "**foo*bar*": "<p>**foo<em>bar</em></p>",
    "*foo _bar* baz_": "<p><em>foo _bar</em> baz_</p>",
    "~~gone~~ ~not~": "<p><del>gone</del> ~not~</p>",
    "`` foo ` bar ``": "<p><code>foo ` bar</code></p>",
    "`foo   bar \nbaz`": "<p><code>foo   bar  baz</code></p>",
    "*foo`*`": "<p>*foo<code>*</code></p>",
    "```foo``": "<p>```foo``</p>",
    r"\*not emphasized\* \a": "<p>*not emphasized* \\a</p>",
    "&copy; &#35; &#X22; &unknown; &amp;lt;": "<p>© # \" &amp;unknown; &amp;lt;</p>",
    "# foo #\n###### foo\n####### foo": "<h2>foo</h2><h6>foo</h6><p>####### foo</p>",
    "#5 bolt": "<p>#5 bolt</p>",
    "Foo\n===\nBar\n---": "<h2>Foo</h2><h3>Bar</h3>",
    "***\n---\n_ _ _": "<hr><hr><hr>",
    "> # Foo\n> bar\n\n> baz": "<blockquote><h2>Foo</h2><p>bar</p></blockquote><blockquote><p>baz</p></blockquote>",
    "> > deep": "<blockquote><blockquote><p>deep</p></blockquote></blockquote>",
    "-\ttab\n-\tother": "<ul><li>tab</li><li>other</li></ul>",
    "- foo\n- bar\n+ baz": "<ul><li>foo</li><li>bar</li></ul><ul><li>baz</li></ul>",
    "3. three\n4. four": '<ol start="3"><li>three</li><li>four</li></ol>',
    "- foo\n  - bar\n    - baz": "<ul><li>foo<ul><li>bar<ul><li>baz</li></ul></li></ul></li></ul>",
    "1. one\n   - sub\n2. two": "<ol><li>one<ul><li>sub</li></ul></li><li>two</li></ol>",
    "1. one\n  - sloppy\n2. two": "<ol><li>one<ul><li>sloppy</li></ul></li><li>two</li></ol>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\nlazy": "<ul><li>a<br>lazy</li></ul>",
    "text\n2. no list": "<p>text<br>2. no list</p>",
    "text\n- list": "<p>text</p><ul><li>list</li></ul>",
    "| a | b |\n|:-:|--:|\n| `x\\|y` | **c** |\n| 1 |": "<div><table><thead><tr><th class=\"center\">a</th>"
    "<th class=\"right\">b</th></tr></thead><tbody><tr><td class=\"center\"><code>x|y</code></td>"
    "<td class=\"right\"><strong>c</strong></td></tr><tr><td class=\"center\">1</td><td class=\"right\"></td></tr>"
    "</tbody></table></div>",
    "a | b\n- | -\n1<br>2 | 3": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1<br>2</td>"
    "<td>3</td></tr></tbody></table></div>",
    "a | b\nno table": "<p>a | b<br>no table</p>",
    # What models write
    "line\nbreaks  \nstay": "<p>line<br>breaks<br>stay</p>",
    "**Note:** ends here.": "<p><strong>Note:</strong> ends here.</p>",
    "中文**强调**中文": "<p>中文<strong>强调</strong>中文</p>",
    "- [x] done\n- [ ] open": '<ul><li class="task"><input type="checkbox" checked="">done</li>'
    '<li class="task"><input type="checkbox">open</li></ul>',
    "*a\n\nb*": "<p>*a</p><p>b*</p>",
    # Math stays text
    "$a_1 * b_2 * c$": "<p><span>$a_1 * b_2 * c$</span></p>",
    "It costs $5 and *not* $6.": "<p>It costs $5 and <em>not</em> $6.</p>",
    r"\(x_1 * y_1 * z\)": r"<p><span>\(x_1 * y_1 * z\)</span></p>",
    "\\[\n\\frac{a}{b}\n\\]\nnext": "<div>\\[\n\\frac{a}{b}\n\\]</div><p>next</p>",
    "$$x*y*z$$": "<div>$$x*y*z$$</div>",
}  # fmt: skip
CODE = {
    "```python\nx = 1\n```\nafter": [["python", "x = 1"]],
    "~~~\na\n```\nb\n~~~": [["", "a\n```\nb"]],
    "````md\n```py\nx\n```\n````": [["md", "```py\nx\n```"]],
    "```js title=x\n<b>&amp;\n": [["js", "<b>&amp;\n"]],
    "- item\n  ```sh\n  ls\n\n    -l\n  ```\n- next": [["sh", "ls\n\n  -l"]],
    "1. a\n   ```\n   - b\n   ```\n2. c": [["", "- b"]],
    "    indented\n\n      more\n\ntext": [["", "indented\n\n  more"]],
    "> ```\n> quoted\n> ```": [["", "quoted"]],
    "```c++\n\tx\n```": [["c++", "\tx"]],
    "```make\nall: a\n\tcc a\n\t\t-o b\n  \tx\n```": [["make", "all: a\n\tcc a\n\t\t-o b\n  \tx"]],
    "1. a\n\t```go\n\tif x {\n\t\ty()\n\t}\n\t```": [["go", "if x {\n\ty()\n}"]],
    "- a\n  ```make\n  all:\n  \tcc\n  ```": [["make", "all:\n\tcc"]],
    "> ```make\n> all:\n> \tcc\n> ```": [["make", "all:\n\tcc"]],
    "\tall:\n\t\tcc": [["", "all:\n\tcc"]],
}
SHOWN = """(async (text) => {
    const {MarkdownView} = await import("./page/markdown_view.js");
    const view = new MarkdownView();
    view.update(text, false);
    for (const one of view.element.querySelectorAll("*")) {
        for (const name of ["tabindex", "aria-label", "dir", "disabled", "rel", "target", "title"])
            one.removeAttribute(name);
        if (["math", "table"].includes(one.className)) one.removeAttribute("class");
    }
    return view.element.innerHTML;
})"""


@pytest.fixture(scope="module")
def page(api_server: FakeApi, browser: Browser) -> Iterator[Page]:
    """One page for all tests here: what they call keeps nothing."""
    page = browser.open(api_server.url)
    yield page
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(api_server.url)] == []
    page.close()


def shown(page: Page, text: str) -> str:
    """The HTML of what the page makes of a text, attributes for reading aloud and for safety left out."""
    return str(page.evaluate(f"{SHOWN}({json.dumps(text)})"))


def test_markdown_becomes_elements(page: Page) -> None:
    found = page.evaluate(f"Promise.all({json.dumps(list(CASES))}.map({SHOWN}))")
    assert dict(zip(CASES, found, strict=True)) == CASES


def test_code_keeps_its_text(page: Page) -> None:
    collect = """(async (texts) => {
        const {parse} = await import("./page/markdown.js");
        const codes = (blocks) => blocks.flatMap((block) => block.type === "code" ? [[block.language, block.text]]
            : codes([...(block.children ?? []), ...(block.items ?? []).flatMap((item) => item.children)]));
        return texts.map((text) => codes(parse(text)));
    })"""
    found = page.evaluate(f"{collect}({json.dumps(list(CODE))})")
    assert dict(zip(CODE, found, strict=True)) == CODE


@pytest.mark.parametrize(
    ("text", "href"),
    [
        ("[a](https://example.org/x_y_z 'title')", "https://example.org/x_y_z"),
        ("[a](<http://example.org/a b>)", "http://example.org/a%20b"),
        ("[a](https://en.wikipedia.org/wiki/Rust_(film))", "https://en.wikipedia.org/wiki/Rust_(film)"),
        ("[mail](mailto:a@example.org)", "mailto:a@example.org"),
        ("<https://example.org/?q=1&r=2>", "https://example.org/?q=1&r=2"),
        ("see https://example.org/a_b, or not", "https://example.org/a_b"),
        ("**https://example.org/**", "https://example.org/"),
        ("(https://example.org/x)", "https://example.org/x"),
        ("![picture](https://example.org/p.png)", "https://example.org/p.png"),
        ("[a](javascript:alert(1))", None),
        ("[a](JaVaScRiPt&colon;alert(1))", None),
        ("[a](java\\\nscript:alert(1))", None),
        ("[a](data:text/html,x)", None),
        ("[a](vbscript:x)", None),
        ("[a](file:///etc/passwd)", None),
        ("[a](//example.org)", None),
        ("[a](v1/models)", None),
        ("<javascript:alert(1)>", None),
        ("![x](data:text/html,x)", None),
    ],
)
def test_links_lead_to_the_web_or_nowhere(page: Page, text: str, href: str | None) -> None:
    links = page.evaluate(f"""(async () => {{
        const {{MarkdownView}} = await import("./page/markdown_view.js");
        const view = new MarkdownView();
        view.update({json.dumps(text)}, false);
        return [...view.element.querySelectorAll("a")].map((a) => [a.getAttribute("href"), a.rel, a.target]);
    }})()""")
    assert links == ([] if href is None else [[href, "noopener noreferrer nofollow", "_blank"]])


def test_html_stays_text(page: Page) -> None:
    hostile = [
        "<script>document.title = 'hacked'</script>",
        "<img src=x onerror=\"document.title='hacked'\">",
        "<a href='javascript:x'>a</a><iframe srcdoc='x'></iframe><svg onload=x>",
        "```html\n<script>x</script>\n```\n<style>*{display:none}</style>",
        "| <b>a</b> |\n|---|\n| <img src=x> |",
        "[<img src=x>](https://example.org)",
        "`<b>` $<b>$ \\[<b>\\] **<b>**",
    ]
    allowed = {"P", "A", "BR", "CODE", "PRE", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "svg", "use", "DIV", "TABLE",
               "THEAD", "TBODY", "TR", "TH", "TD", "STRONG"}  # fmt: skip
    for text in hostile:
        names, content = page.evaluate(f"""(async () => {{
            const {{MarkdownView}} = await import("./page/markdown_view.js");
            const view = new MarkdownView();
            view.update({json.dumps(text)}, false);
            document.body.append(view.element);
            return [[...view.element.querySelectorAll("*")].map((one) => one.tagName), view.element.textContent];
        }})()""")
        assert set(names) <= allowed, text
        assert "<" in content
    assert page.evaluate("document.title") == "npqwen"


def test_streaming_ends_with_what_the_whole_text_gives(page: Page) -> None:
    # Random texts of all markup, cut anywhere, several times.
    differing = page.evaluate("""(async () => {
        const {MarkdownView} = await import("./page/markdown_view.js");
        const parts = ["a ", "word ", "\\n", "\\n", "\\n\\n", "- ", "1. ", "  - ", "   ", "    ", "> ", "# ", "```",
            "```\\n", "~~~\\n", "`", "*", "**", "_", "~~", "[x](", "http://a.b/c", ")", "[ ] ", "| a | b |\\n",
            "|---|---|\\n", "|", "$", "$$", "\\\\(", "\\\\)", "\\\\[", "\\\\]", "---", "===", "<b>", "&amp;", "中",
            "\\\\", "!", "<br>", "```js\\n", "```py\\n", "```html\\n", "```diff\\n", "'", '"', '"'.repeat(3), "/*",
            "*/", "//", " #", "<!--", "-->", "if ", "=", "1.5"];
        let state = 1;
        const random = (count) => {
            state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
            return Math.floor((state / 2 ** 32) * count);
        };
        const found = [];
        for (let round = 0; round < 500; round++) {
            const text = Array.from({length: 5 + random(40)}, () => parts[random(parts.length)]).join("");
            const whole = new MarkdownView();
            whole.update(text, false);
            const streamed = new MarkdownView();
            for (let at = 0; at < text.length; at += 1 + random(5)) streamed.update(text.slice(0, at), true);
            streamed.update(text, true);
            streamed.update(text, false);
            if (streamed.element.innerHTML !== whole.element.innerHTML) found.push(text);
        }
        return found;
    })()""")
    assert differing == []


def test_only_the_last_blocks_are_made_anew(page: Page) -> None:
    kept = page.evaluate("""(async () => {
        const {MarkdownView} = await import("./page/markdown_view.js");
        const view = new MarkdownView();
        view.update("# a\\n\\nb\\n\\n```py\\nx = 1\\n", true);
        const before = [...view.element.children];
        view.update("# a\\n\\nb\\n\\n```py\\nx = 1\\ny = 2\\n```\\n\\nafter", true);
        return before.map((one, i) => view.element.children[i] === one);
    })()""")
    assert kept == [True, True, True]


@pytest.mark.parametrize(
    ("language", "code", "tokens"),
    [
        ("python", 'def f(x="#"):  # why\n    return 1.5', ["keyword def", 'string "#"', "comment # why",
                                                            "keyword return", "number 1.5"]),
        ("py", '"""a\n"b" # c"""\nx2 = 3', ['string """a\n"b" # c"""', "number 3"]),
        ("js", "let s = `a\n// b`; // c\n/* d\n */ 'it\\'s'", ["keyword let", "string `a\n// b`", "comment // c",
                                                              "comment /* d\n */", "string 'it\\'s'"]),
        ("json", '{"a": [1, true]}', ['string "a"', "number 1", "keyword true"]),
        ("sh", "echo ${#x} # c", ["keyword echo", "comment # c"]),
        ("SQL", "SELECT 'x' -- y", ["keyword SELECT", "string 'x'", "comment -- y"]),
        ("html", '<a href="x">y</a><!-- z -->', ["tag <a", 'string "x"', "tag >", "tag </a", "tag >",
                                                 "comment <!-- z -->"]),
        ("diff", "@@ 1\n-a\n+b\n c", ["comment @@ 1", "tag -a", "string +b"]),
        ("klingon", "if 'x' 1", ["string 'x'", "number 1"]),
        ("text", "if 'x' 1", []),
    ],
)  # fmt: skip
def test_code_is_colored_and_stays_what_it_is(page: Page, language: str, code: str, tokens: list[str]) -> None:
    found, whole, streamed = page.evaluate(f"""(async (language, code) => {{
        const {{tokens}} = await import("./page/highlight.js");
        const {{MarkdownView}} = await import("./page/markdown_view.js");
        const all = tokens(code, language);
        const source = "```" + language + "\\n" + code;
        const [whole, streamed] = [new MarkdownView(), new MarkdownView()];
        whole.update(source, true);
        for (let end = 1; end <= source.length; end++) streamed.update(source.slice(0, end), true);
        if (whole.element.querySelector("code").textContent !== code) throw Error("other text");
        return [all.filter(({{kind}}) => kind).map(({{kind, text}}) => `${{kind}} ${{text}}`),
            whole.element.innerHTML, streamed.element.innerHTML];
    }})({json.dumps(language)}, {json.dumps(code)})""")
    assert found == tokens
    assert streamed == whole


def test_unfinished_markup_is_shown_as_what_it_becomes(page: Page) -> None:
    streamed = {
        "some **bold te": "some bold te",
        "a `code": "a code",
        "text\n-": "text",
        "text\n```": "text",
        "see [the page](https://exam": "see the page",
        "| a | b |": "a\tb",
        "# ": "",
    }
    for text, expected in streamed.items():
        found = page.evaluate(f"""(async () => {{
            const {{MarkdownView}} = await import("./page/markdown_view.js");
            const view = new MarkdownView();
            view.update({json.dumps(text)}, true);
            document.body.append(view.element);
            const text = view.element.innerText;
            view.element.remove();
            return text.replace(/^text\\n$/, "text").trim();
        }})()""")
        assert found in (expected, expected + "\n\ntext"), text


@pytest.mark.parametrize(
    "text",
    [
        "'>'.repeat(50_000)",
        "'- '.repeat(20_000)",
        "'['.repeat(50_000)",
        "'[a]('.repeat(20_000)",
        "'*a '.repeat(20_000) + 'a* '.repeat(20_000)",
        "'*a **b _c '.repeat(10_000)",
        "'a* _b '.repeat(20_000)",
        "Array.from({length: 400}, (_, i) => '`'.repeat(i)).join('a')",
        "'$a '.repeat(50_000)",
        "'$$\\n\\\\[\\n'.repeat(10_000)",
        "'\\\\('.repeat(50_000)",
        "'|'.repeat(20_000) + '\\n' + '|-'.repeat(20_000)",
        "'<'.repeat(50_000) + 'http://'.repeat(10_000)",
        "'    '.repeat(20_000) + 'x'",
        "'# '.repeat(50_000)",
        "'```js\\n' + '`'.repeat(1) + '\\\\'.repeat(50_000)",
        "'```py\\n' + '\"\"\"x '.repeat(10_000) + '#'.repeat(50_000)",
        "'```html\\n' + '<!--'.repeat(20_000) + '=\"'.repeat(20_000)",
    ],
)
def test_hostile_texts_take_neither_the_stack_nor_forever(page: Page, text: str) -> None:
    shown = page.evaluate(f"""(async () => {{
        const {{MarkdownView}} = await import("./page/markdown_view.js");
        const view = new MarkdownView();
        const text = {text};
        view.update(text, true);
        view.update(text, false);
        return view.element.childElementCount;
    }})()""")
    assert shown > 0
