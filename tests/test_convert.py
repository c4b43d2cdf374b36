"""Raw files into atomic files: formats, bad input, and what RecBole makes of the tokens."""

from __future__ import annotations

import gzip
import json

import pytest
from convert_helpers import as_recbole_reads, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.data.preparation import atomic
from recbole_raserec.data.preparation.convert import Options, prepare
from recbole_raserec.errors import DatasetError

# ---------------------------------------------------------------- formats


def test_sequences_take_their_times_from_the_position_and_continue_a_user_met_again(convert):
    summary, table = convert("anna a b c\nbob c\n\nanna d\n", "sequences")
    assert summary.path.read_text() == (
        "user_id:token\titem_id:token\ttimestamp:float\nanna\ta\t0\nanna\tb\t1\nanna\tc\t2\nanna\td\t3\nbob\tc\t0\n"
    )
    assert (summary.users, summary.items, summary.interactions, summary.bad_lines) == (2, 4, 5, 0)
    assert len(table) == 5


def test_sequences_with_a_separator_keep_spaces_in_names(convert):
    _, table = convert("anna;the first;the second\n", "sequences", sep=";")
    assert list(table["item_id"]) == ["the first", "the second"]


def test_amazon_ratings_without_header_sorted_by_time_ties_in_input_order(convert):
    _, table = convert("A1,B3,5.0,30\nA1,B1,4.0,10\nA2,B9,1.0,5\nA1,B8,2.0,10\nA1,B7,3.0,10\n")
    assert rows(table) == [
        ("A1", "B1", 4, 10),
        ("A1", "B8", 2, 10),
        ("A1", "B7", 3, 10),
        ("A1", "B3", 5, 30),
        ("A2", "B9", 1, 5),
    ]


def test_quotes_hold_separators_and_quotes(convert):
    _, table = convert('"Doe, Ann","say ""hi""",5,1\n"Doe, Ann",j"k,5,2\n')
    assert rows(table) == [("Doe, Ann", 'say "hi"', 5, 1), ("Doe, Ann", 'j"k', 5, 2)]


def test_movielens_double_colon(convert):
    summary, table = convert("1::1193::5::978300760\r\n1::661::3::978302109\r\n")
    assert rows(table) == [("1", "1193", 5, 978300760), ("1", "661", 3, 978302109)]
    assert b"\r" not in summary.path.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "userId,movieId,rating,timestamp\n1,2,3.5,9\n1,5,4.0,8\n",
        "timestamp\trating\titem_id:token\tuser_id:token\n9\t3.5\t2\t1\n8\t4\t5\t1\n",
        '\ufeff"user","item","score","time"\n"1","2","3.5","9"\n"1","5","4","8"\n',
    ],
)
def test_columns_are_found_by_their_names(convert, text):
    _, table = convert(text)
    assert rows(table) == [("1", "5", 4, 8), ("1", "2", 3.5, 9)]


def test_columns_by_name_and_by_position(convert):
    text = "who;what;x;when\nu;i;7;2014-07-23\nu;j;7;1970-01-02 00:00:01\n"
    _, table = convert(text, user_col="who", item_col="what", time_col="when", sep=";")
    assert rows(table) == [("u", "j", 86401), ("u", "i", 1406073600)]
    _, table = convert("9,i,u\n3,j,u\n", user_col="3", item_col="2", time_col="1", overwrite=True)
    assert rows(table) == [("u", "j", 3), ("u", "i", 9)]


def test_without_a_time_column_the_lines_are_in_order(convert):
    _, table = convert("user,item\nu,b\nu,a\n", time_col="none")
    assert list(table["item_id"]) == ["b", "a"]
    assert "rating" not in table


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("u,i,5\n", {}, "no time column.*--time_col=none"),
        ("user,item,when\nu,i,5\n", {}, "no time column.*user, item, when"),
        ("user,item,time\nu,i,5\n", {"time_col": "clock"}, "--time_col=clock: no such column"),
        ("u,i,3,5\n", {"item_col": "0"}, "--item_col=0: .*count from 1"),
        ("u,i,3,5\n", {"item_col": "1", "user_col": "1"}, "used twice"),
        ("\nu,i,3,5\n", {}, "first line is blank"),
    ],
)
def test_columns_that_cannot_be_found(convert, text, options, message):
    with pytest.raises(DatasetError, match=message) as error:
        convert(text, **options)
    assert "raw.txt" in str(error.value)


def test_amazon_reviews_of_every_generation(convert):
    old = {"reviewerID": "A1", "asin": "0001", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "a\tb"}
    new = {"user_id": "A1", "asin": "C1", "parent_asin": "P1", "rating": 4.0, "timestamp": 1588687728923}
    _, table = convert("\n".join(map(json.dumps, (new, old))), "amazon")
    assert rows(table) == [("A1", "0001", 5, 1400000000), ("A1", "P1", 4, 1588687728923)]


def test_gzip_is_recognised_by_its_content_and_a_cut_one_is_reported(convert):
    packed = gzip.compress(b"u,i,5,1\n" * 5000)
    summary, _ = convert(packed)
    assert summary.interactions == 5000
    with pytest.raises(DatasetError, match="damaged gzip"):
        convert(packed[:-20], overwrite=True)


# ---------------------------------------------------------------- bad input


def test_bad_lines_are_counted_and_the_first_is_named(convert):
    good = "".join(f"u{n},i,5,{n}\n" for n in range(400))
    summary, table = convert(good[: good.index("u7,")] + "u,i\nu,i,5,soon\n\nNA,i,5,3\n" + good[good.index("u7,") :])
    assert summary.bad_lines == 3
    assert summary.first_bad == "line 8: rating or time is missing or not a number: '', ''"
    assert len(table) == 400
    assert "line 8" in summary.text()


@pytest.mark.parametrize("header", ["", "user,item,note,timestamp\n"])
def test_the_bad_line_is_named_behind_blank_lines_and_line_breaks_in_quotes(convert, header):
    good = "".join(f"u{n},i,3,{n}\n" for n in range(200))
    summary, table = convert(header + 'u,i,"3\r\n",1\n\n  \n' + "v,i,3,soon\n" + good, user_col="1", item_col="2")
    assert (summary.bad_lines, len(table)) == (1, 201)
    assert summary.first_bad.startswith(f"line {6 if header else 5}: ")


@pytest.mark.parametrize("sep", ["::", ", ", "¦", "\x1f"])
def test_any_separator_whatever_else_stands_in_the_line(convert, sep):
    lines = [sep.join(("u", f"i{n}", "3", str(n), "more")) for n in range(50)] + [sep.join(("u", "j", "3", "later"))]
    summary, table = convert("\n".join(lines), sep=sep, max_bad=0.1)
    assert (len(table), summary.first_bad.partition(":")[0]) == (50, "line 51")


def test_nul_is_taken_for_a_wrong_encoding(convert):
    summary, _ = convert(b"a\x00b,i,3,1\n" + b"u,i,3,2\n" * 200)
    assert "(--encoding)" in summary.first_bad


def test_too_many_bad_lines_are_an_error_unless_tolerated(convert):
    text = "u,i,5,1\nu,j,5,2\noops\nu,k,5,3\n"
    with pytest.raises(DatasetError, match=r"1 of 4 lines .*line 3.*--max_bad=0.25"):
        convert(text)
    assert convert(text, max_bad=0.25)[0].interactions == 3


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("", "ratings", "it is empty"),
        ("user,item,rating,timestamp\n", "ratings", "it is empty"),
        ("a\nb\n", "sequences", "2 bad lines; first: line 1"),
        ("A1,B1,5,3\n", "amazon", "not a JSON object"),
        ('["A1"]\n{"asin": 3}\n', "amazon", "holds no interaction"),
        (b"\x00\x01\x02 \xff\xfe x\n" * 20, "sequences", "control character"),
    ],
)
def test_nothing_usable(convert, text, form, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        convert(text, form)
    assert not (tmp_path / "out").exists()


def test_an_open_quote_loses_the_lines_it_swallows_and_says_so(convert):
    text = "u,i,5,1\n" * 10 + '"u,i,5,1\n' + "u,i,5,1\n" * 30000
    with pytest.raises(DatasetError, match="line 11"):
        convert(text)


@pytest.mark.parametrize("token", ["a\tb", "a\nb", "a\x07", "a\rb"])
def test_tokens_an_atomic_file_cannot_hold_are_refused(convert, token):
    review = {"reviewerID": "A1", "asin": token, "overall": 5.0, "unixReviewTime": 14}
    with pytest.raises(DatasetError, match=r"line 1: the item .*cannot hold it"):
        convert(json.dumps(review), "amazon")


def test_a_leading_quote_is_refused_because_recbole_would_swallow_the_lines_after_it(convert):
    with pytest.raises(DatasetError, match="begins with a quote"):
        convert('u "i j\n', "sequences")


@pytest.mark.parametrize("token", sorted(atomic.MISSING - {""}))
def test_tokens_recbole_reads_as_missing_are_bad_lines(convert, token, tmp_path):
    summary, table = convert(f"u;{token}\nv;i\n", "sequences", sep=";", max_bad=0.5)
    assert summary.bad_lines == 1
    assert not table.isna().any(axis=None)
    probe = tmp_path / "probe.inter"
    probe.write_text(f"user_id:token\titem_id:token\nu\t{token}\n")
    assert as_recbole_reads(probe)["item_id"].isna().all()


def test_wrong_encoding_is_named(convert):
    text = "é,i,5,1\n".encode("latin-1")
    with pytest.raises(DatasetError, match="--encoding"):
        convert(text)
    assert convert(text, encoding="latin-1")[1]["user_id"][0] == "é"


_TOKENS = st.text(min_size=1, max_size=6).map(str.strip).filter(lambda t: t not in atomic.MISSING and atomic.fits(t))


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(_TOKENS, _TOKENS), min_size=1, max_size=8))
def test_every_token_that_fits_is_read_back_as_it_was(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    reviews = [{"reviewerID": u, "asin": i, "unixReviewTime": n} for n, (u, i) in enumerate(pairs)]
    (folder / "raw").write_text("\n".join(map(json.dumps, reviews)))
    expected = [(u, i) for u, i in pairs if "\ufffd" not in u + i]
    if not expected:
        return
    options = Options(str(folder / "raw"), "amazon", str(folder), "d", max_bad=1.0)
    table = as_recbole_reads(prepare(options).path)
    assert sorted(zip(table["user_id"], table["item_id"], table["timestamp"])) == sorted(
        (u, i, n) for n, (u, i) in enumerate(pairs) if (u, i) in expected
    )
