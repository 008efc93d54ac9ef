"""Write `.env` with fresh random secrets for docker-compose.yaml. An existing file is kept: the databases
hold its passwords.
"""

import base64
import os
import secrets
import sys
from pathlib import Path

VALUES = {
    "POSTGRES_PASSWORD": secrets.token_hex(24),
    "REDIS_PASSWORD": secrets.token_hex(24),
    "AIRFLOW_PASSWORD": secrets.token_urlsafe(18),
    "AIRFLOW_SECRET_KEY": secrets.token_hex(32),
    "AIRFLOW_JWT_SECRET": secrets.token_hex(64),
    "AIRFLOW_FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
}


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ".env")
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except FileExistsError:
        print(f"{path} is there already; nothing changed", file=sys.stderr)
        return 0
    with file:
        file.writelines(f"{name}={value}\n" for name, value in VALUES.items())
    print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
