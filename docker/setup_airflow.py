"""Prepare Airflow's database and its one user; run once before the services start, harmless to repeat."""

import json
import os
import subprocess
from pathlib import Path

subprocess.run(["airflow", "db", "migrate"], check=True)
passwords = Path(os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
temporary = passwords.with_suffix(".tmp")
temporary.touch(mode=0o600)
temporary.write_text(json.dumps({"admin": os.environ["AIRFLOW_PASSWORD"]}))
os.replace(temporary, passwords)
