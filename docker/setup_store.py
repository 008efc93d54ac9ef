"""Make the buckets that are named as arguments, in the store at AWS_ENDPOINT_URL; harmless to repeat."""

import sys

import boto3

store = boto3.client("s3", region_name="us-east-1")
for name in set(sys.argv[1:]) - {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
    store.create_bucket(Bucket=name)
