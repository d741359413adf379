"""A browser for tests: headless Chromium, driven through its debugging pipe.

The protocol: https://chromedevtools.github.io/devtools-protocol/, as JSON messages that end with a
zero byte, on file descriptors 3 and 4 of the browser. By hand, since Playwright, which would do the
same, is 160 MB with a Node of its own, for four tests.
"""

import contextlib
import json
import os
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from types import TracebackType
from typing import Any

# The last ones keep it from looking for a network that a test machine may not have.
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--window-size=1400,900",
    "--remote-debugging-pipe",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)
CORNER = "(e => (b => [b.left, b.top, b.width, b.height])(e.getBoundingClientRect()))"


class Page:
    """One page of a browser of its own; `errors` holds what its console complained of."""

    def __init__(self, browser: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._count, self._buffer = 0, b""
        self._session: str | None = None
        self._frame: dict[str, Any] = {}  # of the frame that was entered
        self._corner = (0.0, 0.0)  # of that frame in the window
        self.errors: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 2**20)
            if not chunk:
                raise RuntimeError("the browser is gone")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, detail = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(detail["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and detail["entry"]["level"] == "error":
            self.errors.append(detail["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and detail["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(item.get("value")) for item in detail["args"]))

    def run(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        where = {"expression": expression, "returnByValue": True, **self._frame}
        result = self.send("Runtime.evaluate", **where)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20.0) -> None:
        """Return once the expression is true; RuntimeError after so many seconds."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise RuntimeError(f"still false after {seconds} s: {expression}")
            time.sleep(0.05)

    def open(self, file: Path) -> None:
        self.send("Page.navigate", url=file.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def enter_frame(self) -> None:
        """From here on, `run`, `wait_for` and `click` are about the page's first frame."""
        corner = self.run(f"{CORNER}(document.querySelector('iframe'))")
        tree = self.send("Page.getFrameTree")["frameTree"]
        frame = tree["childFrames"][0]["frame"]["id"]
        world = self.send("Page.createIsolatedWorld", frameId=frame)
        self._corner = (corner[0], corner[1])
        self._frame = {"contextId": world["executionContextId"]}

    def click(self, element: str, then: str = "true") -> None:
        """Click, with the mouse, in the middle of what a JavaScript expression names.

        Again each second until `then` is true: a page that is still being laid out moves.
        """
        for _ in range(20):
            self.wait_for(element)
            self._click(element)
            with contextlib.suppress(RuntimeError):
                return self.wait_for(then, 1.0)
        raise RuntimeError(f"still false after 20 clicks: {then}")

    def _click(self, element: str) -> None:
        self.run(f"({element}).scrollIntoView({{block: 'center', inline: 'center'}})")
        left, top, width, height = self.run(f"{CORNER}({element})")
        x, y = self._corner[0] + left + width / 2, self._corner[1] + top + height / 2
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def type(self, text: str) -> None:
        """Into what was clicked last."""
        self.send("Input.insertText", text=text)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(b64decode(self.send("Page.captureScreenshot")["data"]))
