"""What people use: an uploaded image, the page, and the description of the addresses."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from servers import TOKEN, Server, encode, serving, write_served_bundle

from cvnb.export.bundle import Bundle

SECONDS = 60_000   # what a loaded machine may take, in ms


def form(content: bytes, name: str = "image", filename: str | None = "a.png") -> tuple[bytes, str]:
    "Write a form with one part."
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--frontier\r\nContent-Disposition: form-data; name="{name}"{named}\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + content + b"\r\n--frontier--\r\n", "multipart/form-data; boundary=frontier"


def test_image_is_classified_as_by_the_bundle(server: Server, served_bundle: Path, photo: np.ndarray) -> None:
    (expected,) = Bundle.load(served_bundle).predict(photo)
    content = encode(photo)
    body, kind = form(content)
    plain = server.ask("/predict", content)
    assert plain.status == 200 and plain.headers["x-request-id"] == plain.json["id"]
    for answer in (plain, server.ask("/predict", body, Content_Type=kind),
                   server.ask("/predict", content, Content_Type="application/x-www-form-urlencoded")):
        found = answer.json
        assert (found["label"], found["model"], found["version"]) == (expected["label"], "pets", server.version)
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
        assert found["confidence"] == pytest.approx(expected["confidence"], abs=1e-6)


def test_request_id_of_the_client_is_kept_if_it_is_harmless(server: Server, photo: np.ndarray) -> None:
    given = "mine-7", "../../etc", "é"
    ids = [server.ask("/predict", encode(photo), X_Request_Id=name).json["id"] for name in given]
    assert ids[0] == "mine-7" and all(len(i) == 24 and i.isalnum() for i in ids[1:])


@pytest.mark.parametrize("content, status", [
    (b"", 400), (b"hello", 415), (b"GIF89a" + bytes(40), 415), (b"%PDF-1.7" + bytes(40), 415),
    (b"\xff\xd8\xff" + bytes(100), 400), (b"\x89PNG\r\n\x1a\n", 400), (b"RIFF\0\0\0\0WEBP", 400)])
def test_file_that_is_no_image_is_refused(server: Server, content: bytes, status: int) -> None:
    body, kind = form(content)
    for answer in server.ask("/predict", content, "POST"), server.ask("/predict", body, Content_Type=kind):
        assert answer.status == status and "image" in answer.json["error"], answer.body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_image_is_refused(server: Server, photo: np.ndarray, kind: str) -> None:
    content = encode(np.tile(photo, (5, 5, 1)), kind)
    answer = server.ask("/predict", content[:len(content) // 2])
    assert answer.status == 400 and "cannot be read" in answer.json["error"]


def test_form_without_an_image_is_refused(server: Server, photo: np.ndarray) -> None:
    bodies = [form(encode(photo), filename=None), (form(b"a")[0], "multipart/form-data"), (b"no form", form(b"")[1])]
    for body, kind in bodies:
        answer = server.ask("/predict", body, Content_Type=kind)
        assert answer.status == 400 and "form" in answer.json["error"], answer.body


def test_form_with_several_files_is_refused_and_an_empty_field_is_none(server: Server, photo: np.ndarray) -> None:
    part = lambda name, content: (b'--x\r\nContent-Disposition: form-data; name="image"; filename="' + name
                                  + b'"\r\n\r\n' + content + b"\r\n")
    content = encode(photo)
    ask = lambda *parts: server.ask("/predict", b"".join(parts) + b"--x--\r\n",
                                    Content_Type="multipart/form-data; boundary=x")
    both = ask(part(b"a.png", content), part(b"b.png", content))
    assert both.status == 400 and "more than one file" in both.json["error"]
    assert ask(part(b"", b""), part(b"a.png", content)).json["label"]
    assert "holds no file" in ask(part(b"", b"")).json["error"]


def test_openapi_names_every_address(server: Server, photo: np.ndarray) -> None:
    found = server.ask("/openapi.json").json
    assert found["openapi"] == "3.1.0" and found["info"]["title"] == "cvnb"
    for path, methods in found["paths"].items():
        path = path.replace("{version}", server.version)
        for method in methods.keys() & {"get", "post", "put"}:
            body = b"{}" if method in ("post", "put") else None
            assert server.ask(path, body, method.upper()).status not in (404, 405), path
    infer = found["paths"]["/v2/models/pets/versions/{version}/infer"]
    assert {*infer["post"]["requestBody"]["content"]} == {"application/json", "application/octet-stream"}
    assert infer["parameters"][0]["name"] == "version" and "500" in infer["post"]["responses"]
    text = json.dumps(found)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= found["components"]["schemas"].keys()


# The page


@pytest.mark.browser
def test_page_shows_the_answer_for_a_dropped_image(server: Server, photo: np.ndarray, tmp_path: Path,
                                                   playwright_page, served_bundle: Path) -> None:
    page = playwright_page
    faults = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    (tmp_path/"a.png").write_bytes(encode(photo))
    (expected,) = Bundle.load(served_bundle).predict(photo)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address, timeout=SECONDS)
    page.wait_for_selector("#about:has-text('pets')", timeout=SECONDS)
    page.set_input_files("#file", tmp_path/"a.png")
    page.wait_for_selector("#result .name", timeout=SECONDS)
    assert page.text_content("#result .name") == expected["label"]
    rows = page.locator("#result .row b").all_text_contents()
    assert rows[0] == expected["label"] and {*rows} == {"cat", "dog", "owl"}
    assert page.is_visible("#picture") and not page.is_visible("#login")
    data = page.evaluate_handle("""bytes => { const t = new DataTransfer();
        t.items.add(new File([new Uint8Array(bytes)], 'b.txt')); return t; }""", list(b"no image"))
    page.dispatch_event("#area", "drop", {"dataTransfer": data})
    page.wait_for_selector("#result .wrong", timeout=SECONDS)
    assert "JPEG, PNG, WEBP" in page.text_content("#result .wrong")
    allowed = {server.address + path for path in ("/", "/model", "/predict")}
    assert {url for url in asked if not url.startswith("blob:")} == allowed
    assert all("415" in fault for fault in faults), faults


@pytest.mark.browser
def test_page_asks_for_the_token_and_shows_names_as_text(tmp_path: Path, photo: np.ndarray, playwright_page) -> None:
    labels = ["<img src=x onerror=document.title='owned'>", "a & b", "owl"]
    bundle = write_served_bundle(tmp_path/"run", labels=labels)
    (tmp_path/"a.png").write_bytes(encode(photo[..., ::-1]))
    page = playwright_page
    with serving(tmp_path/"log", bundle, token=TOKEN) as server:
        page.goto(server.address, timeout=SECONDS)
        page.wait_for_selector("#login", timeout=SECONDS)
        page.fill("#token", "x" * 20)
        page.click("#login button")
        page.wait_for_selector("#about:has-text('Bearer')", timeout=SECONDS)
        page.fill("#token", TOKEN)
        page.click("#login button")
        page.wait_for_selector("#about:has-text('3 classes')", timeout=SECONDS)
        page.set_input_files("#file", tmp_path/"a.png")
        page.wait_for_selector("#result .name", timeout=SECONDS)
        assert {*page.locator("#result .row b").all_text_contents()} == {*labels}
        assert page.title() == "cvnb"
