"""When a report is made again."""

from launch import report


def test_new_results_or_new_code_make_a_new_report(tmp_path):
  results, sources = tmp_path / "results.jsonl", tmp_path / "report"
  sources.mkdir()
  (sources / "page.py").write_text("1")
  results.write_text("{}")
  seen = {report.digest(results, sources)}
  assert report.digest(results, sources) in seen
  for path in (results, sources / "page.py"):
    path.write_text("2")
    assert report.digest(results, sources) not in seen
    seen.add(report.digest(results, sources))
