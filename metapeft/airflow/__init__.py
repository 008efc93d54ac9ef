"""How Airflow runs metapeft. Imports `airflow.sdk` only: parsing a DAG loads no machine-learning library."""
