//! Of the whole page.

use super::*;

fn kernel(op: &str, shape: &str, tokens: usize) -> KernelRow {
    KernelRow {
        date: "2026-11-24".into(),
        tool: "halfbyte".into(),
        commit: "be25cad".into(),
        card: "Card A".into(),
        model: "7b".into(),
        op: op.into(),
        shape: shape.into(),
        tokens: Some(tokens),
        implementation: "own".into(),
        median_us: 12.345_678,
        copy_gb_per_s: 2901.0,
        product_tflop_per_s: 798.6,
        ..KernelRow::default()
    }
}

fn step(tool: &str, checkpointing: &str, tokens_per_second: f64) -> StepRow {
    StepRow {
        tool: tool.into(),
        card: "Card A".into(),
        shape: "mistral-7b".into(),
        batch: 1,
        length: 512,
        gradient_checkpointing: checkpointing.into(),
        tokens_per_second,
        ..StepRow::default()
    }
}

fn step_op(op: &str, op_ms: f64) -> StepOpRow {
    StepOpRow { shape: "mistral-7b".into(), step_ms: 60.0, op: op.into(), op_ms, floor_ms: 5.0, ..StepOpRow::default() }
}

fn full() -> Report {
    Report::new([
        Table::Kernels(vec![kernel("gemm_forward", "16x4096", 16), kernel("gemm_forward", "32x4096", 32)]),
        Table::Steps(vec![step("halfbyte", "auto", 10_875.0), step("unsloth 2026.10.9", "false", 2436.0)]),
        Table::StepOps(vec![step_op("gemm_forward", 20.0), step_op("attention_forward", 30.0)]),
        Table::Decode(vec![DecodeRow { shape: "mistral-7b".into(), tokens_per_second: 268.7, ..DecodeRow::default() }]),
        Table::Load(vec![LoadRow { model: "mistral-7b".into(), warm_gb_per_s: 6.995, ..LoadRow::default() }]),
    ])
}

/// The JSON that the page's script reads.
fn embedded(page: &str) -> serde_json::Value {
    let (_, from) = page.split_once("id=\"data\">").unwrap();
    serde_json::from_str(from.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn every_table_has_its_section() {
    let page = full().html().unwrap();
    for id in ["environment", "steps", "step-ops", "roofline", "curves", "decode-load", "kernels"] {
        assert!(page.contains(&format!("<section id=\"{id}\"")), "{id}");
        assert!(page.contains(&format!("href=\"#{id}\"")), "{id}");
    }
    for text in ["10,875 tokens/s", "unsloth 2026.10.9", "between ops, untimed: 10.0 ms", "268.7", "<noscript>"] {
        assert!(page.contains(text), "{text}");
    }
    assert_eq!(embedded(&page)["columns"]["group"]["names"], json!(["Tx4096"]));
    assert_eq!(embedded(&page)["columns"]["median_us"], json!([12.346, 12.346]));
}

#[test]
fn a_table_without_rows_has_no_section() {
    let steps = Report::new([Table::Steps(vec![step("", "true", 5.0)])]);
    let page = steps.html().unwrap();
    assert!(page.contains("<section id=\"steps\"") && page.contains("<td>halfbyte</td>"));
    for absent in ["step-ops\"", "roofline\"", "kernels\"", "decode-load\"", "<script"] {
        assert!(!page.contains(absent), "{absent}");
    }
    assert_eq!(steps.counts(), [("steps", 1)]);
    assert!(Report::new([Table::Load(vec![])]).counts().is_empty());
}

#[test]
fn text_of_a_row_stays_text() {
    let evil = "</script><script>alert(1)</script><!--\u{2028}\"'&<img src=x onerror=alert(2)>";
    let mut report = full();
    for row in &mut report.kernels {
        (row.op, row.shape, row.card, row.tool) = (evil.into(), evil.into(), evil.into(), evil.into());
    }
    for row in &mut report.steps {
        (row.tool, row.shape, row.layers, row.memory) = (evil.into(), evil.into(), evil.into(), evil.into());
    }
    report.step_ops[0].op = evil.into();
    report.decode[0].shape = evil.into();
    report.load[0].card = evil.into();
    let (page, plain) = (report.html().unwrap(), full().html().unwrap());
    let count = |page: &str, what: &str| page.matches(what).count();
    for tag in ["<script", "</script", "<img", "<!--"] {
        assert_eq!(count(&page, tag), count(&plain, tag), "{tag}");
    }
    assert!(!page.contains('\u{2028}') || page.contains("&lt;!--\u{2028}"), "in HTML it is a character as any other");
    assert_eq!(embedded(&page)["columns"]["op"]["names"], json!([evil]));
}

#[test]
fn the_last_of_rows_that_measure_the_same_counts() {
    let again = KernelRow { median_us: 1.0, date: "2026-11-25".into(), ..kernel("gemm_forward", "16x4096", 16) };
    let elsewhere = KernelRow { commit: "other".into(), ..again.clone() };
    let rows = vec![kernel("gemm_forward", "16x4096", 16), kernel("rope", "16", 16), again.clone(), elsewhere.clone()];
    let report = Report::new([Table::Kernels(rows)]);
    assert_eq!(report.kernels, [again, kernel("rope", "16", 16), elsewhere]);
    let page = report.html().unwrap();
    assert!(page.contains("2 commits of halfbyte: be25cad, other."), "{page}");
}

#[test]
fn several_cards_are_told() {
    let other = KernelRow { card: "Card B".into(), copy_gb_per_s: 1000.0, ..kernel("rope", "16", 16) };
    let page = Report::new([Table::Kernels(vec![kernel("rope", "16", 16), other])]).html().unwrap();
    assert!(page.contains("2 cards: Card A, Card B."));
    assert!(page.contains("<td class=\"n\">2,901</td>") && page.contains("<td class=\"n\">1,000</td>"));
}

#[test]
fn the_same_rows_give_the_same_page() {
    assert_eq!(full().html().unwrap(), full().html().unwrap());
}

#[test]
fn the_page_asks_the_network_for_nothing() {
    let page = full().html().unwrap().replace("http://www.w3.org/2000/svg", "");
    assert!(page.contains("default-src 'none'"));
    for reference in ["http://", "https://", "src=", "@import", "url(", "<link"] {
        assert!(!page.contains(reference), "{reference}");
    }
}

#[test]
fn three_thousand_kernels_fit_in_two_megabytes() {
    let row = |i: usize| KernelRow {
        median_us: 1.0 / (i + 1) as f64,
        least_us: 0.9 / (i + 1) as f64,
        most_us: 1.1 / (i + 1) as f64,
        flops: 1e9 * i as f64,
        ..kernel("nf4_gemm_forward", &format!("{i}x4096x14336 r=16"), i)
    };
    let page = Report::new([Table::Kernels((0..3000).map(row).collect())]).html().unwrap();
    assert!(page.len() < 2_000_000, "{}", page.len());
}

#[test]
fn what_is_no_number_is_drawn_as_missing() {
    let row = KernelRow { percent_of_floor: f64::NAN, floor_us: f64::INFINITY, ..kernel("rope", "16", 16) };
    let steps = vec![step("halfbyte", "true", f64::NAN), step("torch", "true", f64::INFINITY)];
    let page = Report::new([Table::Kernels(vec![row]), Table::Steps(steps)]).html().unwrap();
    assert_eq!(embedded(&page)["columns"]["floor_us"], json!([null]));
    assert!(!page.contains("NaN") && !page.contains("width:inf"));
}
