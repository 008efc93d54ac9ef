"""Write `.env` with fresh random secrets for docker-compose.yaml. What stands there already is kept: the databases
hold its passwords; a file made by an older version gets what it lacks.
"""

import base64
import os
import re
import secrets
import sys
from pathlib import Path

VALUES = {
    "POSTGRES_PASSWORD": secrets.token_hex(24),
    "REDIS_PASSWORD": secrets.token_hex(24),
    "S3_ACCESS_KEY": secrets.token_hex(10),
    "S3_SECRET_KEY": secrets.token_hex(24),
    "AIRFLOW_PASSWORD": secrets.token_urlsafe(18),
    "AIRFLOW_SECRET_KEY": secrets.token_hex(32),
    "AIRFLOW_JWT_SECRET": secrets.token_hex(64),
    "AIRFLOW_FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
    "GRAFANA_PASSWORD": secrets.token_urlsafe(18),
    "METRICS_KEY": f"mp-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}",
    "SERVER_KEY": f"mp-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}",
    "METAPEFT_UID": str(os.getuid() or 50000),  # never root: the checkout then belongs to 50000 (docs/operations.md)
}


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ".env")
    text = path.read_text() if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if not re.fullmatch(r"\s*\w+\s*=\s*", line)]
    text = "".join(lines)  # without names that have no value
    known = {line.partition("=")[0].strip() for line in lines}
    missing = [f"{name}={value}\n" for name, value in VALUES.items() if name not in known]
    if not missing:
        print(f"{path} has everything; nothing changed", file=sys.stderr)
        return 0
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + ("\n" if text and not text.endswith("\n") else "") + "".join(missing))
    os.replace(temporary, path)
    print(f"wrote {len(missing)} values to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
