"""A data set that is there, missing, downloadable, or not what it claims to be."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import socket
import threading
import zipfile

import pytest

from recbole_raserec.data.preparation import download as fetch
from recbole_raserec.data.preparation import download as source
from recbole_raserec.data.preparation.download import ensure_dataset, inter_files
from recbole_raserec.errors import DatasetError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "u1\ti1\t5\t1\nu1\ti2\t4\t2\n"


class FakeConfig(dict):
    """Like RecBole's Config: an option that is not set is None."""

    def __missing__(self, key):
        return None


@pytest.fixture
def config(tmp_path):
    options = {"dataset": "shop", "data_path": str(tmp_path / "data" / "shop"), "eval_args": {"order": "TO"}}
    return FakeConfig(options, USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id", TIME_FIELD="timestamp")


def put(config, content, name=None):
    folder = source.Path(config["data_path"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{config['dataset']}.inter")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        for name, text in files.items():
            content.writestr(name.replace("__", "/").replace("_DOT_", "."), text)
    return buffer.getvalue()


@contextlib.contextmanager
def serving(body, status=200, length=None):
    """A web server that answers every request with `body`; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/sets/Raw_Shop.zip"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def urls(monkeypatch):
    """RecBole's table of URLs, replaced: no test needs a connection."""
    table = {}
    monkeypatch.setattr(source, "recbole_urls", lambda: table)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return table


# ---------------------------------------------------------------- there


def test_a_present_file_is_found_and_nothing_is_downloaded(config, urls, monkeypatch):
    path = put(config, HEADER + ROWS)
    urls["shop"] = "http://127.0.0.1:9/never.zip"
    monkeypatch.setattr(source, "fetch", lambda *_: pytest.fail("downloaded"))
    assert ensure_dataset(config) == path


def test_benchmark_files_must_all_be_there(config, urls):
    config["benchmark_filename"] = ["train", "test"]
    train = put(config, "user_id:token\titem_id:token\nu\ti\n", "shop.train.inter")
    with pytest.raises(DatasetError) as error:
        ensure_dataset(config)
    assert str(train.with_name("shop.test.inter")) in str(error.value)
    assert str(train) not in str(error.value)
    put(config, train.read_text(), "shop.test.inter")
    assert ensure_dataset(config) == train
    assert [path.name for path in inter_files("x", "shop", ["a", "b"])] == ["shop.a.inter", "shop.b.inter"]


def test_the_committed_sample_is_fit(config, urls):
    config.update(dataset="planted", data_path=str(source.Path(__file__).parents[1] / "dataset" / "planted"))
    assert ensure_dataset(config).name == "planted.inter"


# ---------------------------------------------------------------- missing


def test_missing_and_unknown(config, urls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config["data_path"] = "data/shop"
    (tmp_path / "data" / "shops").mkdir(parents=True)
    (tmp_path / "data" / "shops" / "shops.inter").write_text(HEADER + ROWS)
    with pytest.raises(DatasetError) as error:
        ensure_dataset(config)
    message = str(error.value)
    assert f"Looked for: {tmp_path}/data/shop/shop.inter" in message
    assert "A similar name: shops" in message
    assert f"recbole-raserec prepare --input=FILE --format=sequences|ratings|amazon --output={tmp_path}/data" in message
    assert "--data_path=DIR" in message


@pytest.mark.parametrize(
    ("dataset", "page", "command"),
    [
        ("amazon-beauty", source.AMAZON_2014, "--input=reviews_Beauty_5.json.gz --format=amazon"),
        ("amazon-toys-games", source.AMAZON_2014, "--input=reviews_Toys_and_Games_5.json.gz --format=amazon"),
        ("amazon-sports-outdoors-18", source.AMAZON_2018, "--input=Sports_and_Outdoors_5.json.gz --format=amazon"),
        ("amazon-all-beauty-23", source.AMAZON_2023, "--input=All_Beauty.jsonl.gz --format=amazon"),
        ("ml-1m", source.MOVIELENS, "--input=ratings.dat --format=ratings"),
        ("ml-20m", source.MOVIELENS, "--input=ratings.csv --format=ratings"),
        ("gowalla-merged", source.ATOMIC_FILES, "--format=sequences|ratings|amazon"),
    ],
)
def test_recboles_own_data_sets_without_a_connection(config, monkeypatch, tmp_path, dataset, page, command):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", offline)
    config.update(dataset=dataset, data_path=str(tmp_path / dataset))
    with pytest.raises(DatasetError) as error:
        ensure_dataset(config)
    message = str(error.value)
    url = fetch.recbole_urls()[dataset]
    assert f"Download failed: {url}: Name or service not known" in message
    assert f"Ready-made atomic files: {url}" in message
    assert page in message
    assert command in message
    assert f"--output={tmp_path} --name={dataset}" in message
    assert list(tmp_path.iterdir()) == []
    assert error.value.__cause__ is None


def test_the_sample_can_be_made_again(config, urls, tmp_path):
    config.update(dataset="planted", data_path=str(tmp_path / "planted"))
    with pytest.raises(DatasetError, match=f"dataset/planted/generate.py --output={tmp_path}"):
        ensure_dataset(config)


# ---------------------------------------------------------------- downloads


def test_download_renames_the_files_and_keeps_what_was_there(config, urls):
    config_file = put(config, "mine", "shop.item")
    body = archive(Raw_Shop_DOT_inter=HEADER + ROWS, Raw_Shop_DOT_user="a", Raw_Shop_DOT_item="b", README_DOT_md="c")
    with serving(body) as urls["shop"]:
        path = ensure_dataset(config)
    assert path.read_text() == HEADER + ROWS
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["shop.inter", "shop.item", "shop.user"]
    assert config_file.read_text() == "mine"
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["shop"]


def test_download_with_a_folder_and_another_name_inside(config, urls):
    with serving(archive(inner__other_DOT_inter=HEADER + ROWS)) as urls["shop"]:
        assert ensure_dataset(config).read_text() == HEADER + ROWS


def refused(config, message):
    with pytest.raises(DatasetError, match=message) as error:
        ensure_dataset(config)
    text = str(error.value)
    assert text.count("Download failed") == 1
    assert "recbole-raserec prepare" in text
    data = source.Path(config["data_path"]).parent
    assert not any(path.is_file() for path in data.parent.rglob("*"))
    assert [entry.name for entry in data.iterdir()] in ([], ["shop"])


@pytest.mark.parametrize("name", ["../evil.inter", "/evil.inter", "a/../../evil.inter", "..\\evil.inter", "C:x.inter"])
def test_an_archive_that_leads_elsewhere_is_refused(config, urls, name):
    with serving(archive(**{"shop_DOT_inter": HEADER + ROWS, name: "evil"})) as urls["shop"]:
        refused(config, "archive is unsafe")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": b"<html>sorry</html>"}, "not a readable zip"),
        ({"body": archive(readme_DOT_txt="x")}, "holds no interactions of shop: readme.txt"),
        ({"body": archive(a_DOT_inter="x", b_DOT_inter="y")}, "holds no interactions"),
        ({"body": b"", "status": 404}, "404"),
        ({"body": b"PK", "length": 1000}, "connection broke after 2 of 1,000"),
        ({"body": b"PK", "length": 10**18}, "no room on the disk"),
        ({"body": b"", "length": "many"}, "many"),
    ],
)
def test_bad_answers(config, urls, answer, message):
    with serving(**answer) as urls["shop"]:
        refused(config, message)


def test_no_server(config, urls):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        urls["shop"] = f"http://127.0.0.1:{free.getsockname()[1]}/shop.zip"
        refused(config, "Connection refused")


def test_only_web_addresses(config, urls, tmp_path):
    urls["shop"] = (tmp_path / "shop.zip").as_uri()
    refused(config, "not a web address")


def test_a_damaged_member_leaves_nothing(config, urls):
    body = bytearray(archive(Raw_Shop_DOT_inter=HEADER + ROWS * 50))
    body[60:70] = b"\xff" * 10
    with serving(bytes(body)) as urls["shop"]:
        refused(config, "not a readable zip")


def test_a_downloaded_file_is_checked_too(config, urls):
    with serving(archive(Raw_Shop_DOT_inter="user,item\n1,2\n")) as urls["shop"], pytest.raises(DatasetError) as error:
        ensure_dataset(config)
    assert "has no RecBole header" in str(error.value)


# ---------------------------------------------------------------- unfit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (HEADER, "no interactions"),
        (HEADER + "\n", "no interactions"),
        ("user,item,time\n1,2,3\n", "no RecBole header: .*'user,item,time'"),
        ("user_id:token\titem_id:tokens\n1\t2\n", "no RecBole header"),
        ("user_id:token\titem_id\n1\t2\n", "no RecBole header"),
        ("user_id:token\tuser_id:token\n1\t2\n", "no RecBole header"),
        (
            "user_id:token\titem_id:token\n1\t2\n",
            r"lacks the column\(s\) timestamp:float; its header has user_id:token, ",
        ),
        (
            "user:token\titem_id:token\ttimestamp:token\n1\t2\t3\n",
            r"lacks the column\(s\) user_id:token, timestamp:float",
        ),
        (bytes(range(256)) * 20, "not a text file"),
        (b"user_id:token\x00" * 9, "NUL"),
        (gzip.compress((HEADER + ROWS).encode(), mtime=0), "compressed"),
        ("\ufeff" + HEADER + ROWS, "byte order mark"),
    ],
)
def test_files_that_are_no_atomic_files(config, urls, content, message):
    path = put(config, content)
    with pytest.raises(DatasetError, match=message) as error:
        ensure_dataset(config)
    assert str(path) in str(error.value)


def test_times_are_needed_only_for_an_order_in_time(config, urls):
    put(config, "user_id:token\titem_id:token\nu\ti\n")
    config["eval_args"] = {"order": "RO"}
    ensure_dataset(config)


def test_windows_line_ends_and_a_character_at_the_edge_of_the_block_are_fine(config, urls):
    put(config, (HEADER + "é\ti\t5\t1\n" * 20000).replace("\n", "\r\n"))
    ensure_dataset(config)
