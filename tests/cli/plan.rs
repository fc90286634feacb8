use crate::{Place, args, fixtures, halfbyte};

const MISTRAL: [&str; 7] = ["plan", "--shape", "mistral-7b", "--gpu", "rtx4090", "--max-length", "2048"];

#[test]
fn prints_the_table_of_a_run_that_fits() {
    let run = halfbyte(MISTRAL.iter().chain(&["--memory", "22GiB"]));
    let text = run.ok().lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect::<String>();
    for part in [
        "mistral-7b on rtx4090: 1 × 2048 tokens, r = 16, 41,943,040 trainable weights",
        "embedding and head 500.01 MiB",
        "weights of the layers 3.35 GiB",
        "adapter 80.00 MiB",
        "gradients 160.00 MiB",
        "AdamW's state (managed) 480.00 MiB",
        "kept activations",
        "scratch",
        "workspace of the ops",
        "budget 22.00 GiB",
        "head room",
        "layers 0-31 keep all",
        "tokens/s",
        "longest row at batch 1: ",
        "largest batch of this length: ",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn one_json_object_has_every_byte() {
    let value = halfbyte(MISTRAL.iter().chain(&["--memory", "8GiB", "--batch", "4", "--json"])).json();
    let number = |key: &str| value[key].as_u64().unwrap_or_else(|| panic!("{key} in {value:#}"));
    let items: u64 = value["device_bytes"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(items, number("arena_bytes"));
    assert!(number("total_bytes") <= 8 << 30);
    assert_eq!(number("total_bytes") + number("head_room_bytes"), 8 << 30);
    assert_eq!(value["layers"].as_array().unwrap().len(), 32);
    assert!(number("longest_row") >= 8192 && number("largest_batch") >= 4);
    assert!(value["tokens_per_second"].as_f64().unwrap() > 100.0);
}

#[test]
fn gradient_checkpointing_and_the_optimizer_change_the_bytes() {
    let total = |more: &[&str]| {
        let value = halfbyte(MISTRAL.iter().chain(more).chain(&["--json"])).json();
        value["total_bytes"].as_u64().unwrap()
    };
    let (all, recompute) = (total(&["--gradient-checkpointing", "false"]), total(&["--gradient-checkpointing"]));
    assert!(recompute < all);
    let eight = total(&["--gradient-checkpointing", "--optim", "paged_adamw_8bit"]);
    assert!(eight < recompute - (200 << 20), "moments in 8 bits: {eight} against {recompute}");
}

#[test]
fn a_directory_is_planned_as_it_would_be_loaded() {
    let place = Place::with("tiny-mistral");
    let bytes = |dir: &std::path::Path, more: &[&str]| {
        let mut a = args!["plan", "--model", dir, "--gpu", "rtx3090", "--max-length", "64", "--json"].to_vec();
        a.extend(more.iter().map(std::ffi::OsString::from));
        halfbyte(a).json()["device_bytes"]["weights_of_the_layers"].as_u64().unwrap()
    };
    let (four, sixteen) = (bytes(&place.model(), &[]), bytes(&place.model(), &["--load-in-4bit", "false"]));
    assert!(four < sixteen, "{four} against {sixteen}");
    assert_eq!(bytes(&fixtures().join("tiny-mistral-nf4-bf16"), &[]), four);
}

#[test]
fn what_cannot_be_planned_is_one_error_with_exit_code_2() {
    let plan = |more: &[&str]| halfbyte(["plan"].iter().chain(more));
    plan(&["--shape", "mistral-7b", "--gpu", "voodoo2"]).fails(2, &["--gpu", "voodoo2", "rtx4090"]);
    plan(&["--shape", "mistral-8b", "--gpu", "h100"]).fails(2, &["--shape", "mistral-8b", "mistral-7b"]);
    plan(&["--shape", "tiny", "--gpu", "h100", "--memory", "lots"]).fails(2, &["--memory", "lots", "24GiB"]);
    plan(&["--shape", "tiny", "--gpu", "h100", "--r", "0"]).fails(2, &["--r", "a rank"]);
    plan(&["--shape", "tiny", "--gpu", "h100", "--optim", "sgd"]).fails(2, &["--optim", "paged_adamw_8bit"]);
    plan(&["--shape", "tiny", "--gpu", "h100", "--batch", "1000000", "--max-length", "1000000"])
        .fails(2, &["--max-length", "at most"]);
    plan(&["--model", "/nowhere", "--gpu", "h100"]).fails(2, &["/nowhere"]);
    halfbyte(MISTRAL.iter().chain(&["--memory", "6GiB", "--batch", "64"])).fails(
        2,
        &["--memory: found 6.00 GiB", "for 64 × 2048 tokens", "largest: scratch", "what fits: ", "rows of 2048 tokens"],
    );
}
