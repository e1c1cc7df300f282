"""The marts: a dbt project on the tables, run by Spark. What it makes, how it runs, what Python it needs."""
