"""Pages opened by Chromium: what the tests that look at them share."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --enable-logging=stderr --virtual-time-budget=10000"
)


def chromium(page: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )


def run_in_browser(report: Path, tmp_path: Path, script: str) -> tuple[dict[str, object], str]:
    """Open the page with a script appended that leaves its findings in a <pre>; findings and console errors."""
    probe = (
        "<script>const problems = [];"
        "addEventListener('error', (e) => problems.push(String(e.message)));"
        "addEventListener('unhandledrejection', (e) => problems.push(String(e.reason)));"
        "addEventListener('securitypolicyviolation', (e) => problems.push(e.blockedURI));</script>"
    )
    finish = (
        "<script>(async () => { const found = {};"
        f"{script}"
        "found.problems = problems; const out = document.createElement('pre'); out.id = 'found';"
        "out.textContent = JSON.stringify(found); document.body.append(out); })();</script>"
    )
    page = report.read_text(encoding="utf-8").replace("<head>", f"<head>{probe}").replace("</body>", f"{finish}</body>")
    probed = tmp_path / "probed.html"
    probed.write_text(page, encoding="utf-8")
    done = chromium(probed, tmp_path, "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(text), console
