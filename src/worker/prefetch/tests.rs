use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{Advice, fadvise};

use super::*;
use crate::model::PrefetchEnd;

const SIZE: u64 = 96 << 20;

fn model() -> ModelName {
    ModelName::new("m").expect("a good name")
}

/// A file on a real disk, of which nothing is in the page cache.
fn cold(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let piece: Vec<u8> = (0..1 << 20).map(|i: u32| i.to_le_bytes()[1]).collect();
    let mut file = File::create(&path).expect("a file");
    for _ in 0..SIZE >> 20 {
        std::io::Write::write_all(&mut file, &piece).expect("written");
    }
    file.sync_all().expect("it is on the disk");
    drop_cache(&path);
    path
}

fn drop_cache(path: &Path) {
    let file = File::open(path).expect("it is there");
    fadvise(&file, 0, None, Advice::DontNeed).expect("the cache can be dropped");
}

fn resident(path: &Path) -> u64 {
    let file = File::open(path).expect("it is there");
    cached::cached(&file, 0, SIZE).expect("it is ours").get()
}

/// A folder on a disk, beside the sources: other folders may be in memory.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
    let path = folder.path().join("probe");
    fs::write(&path, vec![1; 1 << 20]).expect("written");
    File::open(&path)
        .and_then(|f| f.sync_all())
        .expect("it is on the disk");
    drop_cache(&path);
    let file = File::open(&path).expect("it is there");
    let left = cached::cached(&file, 0, 1 << 20).expect("it is ours");
    assert_eq!(
        left,
        Bytes::ZERO,
        "the sources lie on a file system without a page cache"
    );
    folder
}

fn order(files: &[&PathBuf]) -> PrefetchOrder {
    PrefetchOrder {
        number: 7,
        model: model(),
        reason: PrefetchReason::Waiting,
        files: files.iter().copied().cloned().collect(),
        most: Bytes::gib(1),
        spare: Bytes(1),
    }
}

fn run(order: PrefetchOrder, meanwhile: impl FnOnce(&Control)) -> PrefetchReport {
    let control = Control::new(order.spare);
    meanwhile(&control);
    carry_out(order, &control, Clock::start())
}

#[test]
fn files_become_resident_each_once_however_it_is_named() {
    let folder = folder();
    let file = cold(folder.path(), "a");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    let hard = folder.path().join("hard");
    fs::hard_link(&file, &hard).expect("a hard link");
    let missing = folder.path().join("missing");
    assert!(resident(&file) < SIZE / 10);
    let report = run(order(&[&link, &missing, &hard, &file]), |_| ());
    assert_eq!((report.end, report.size), (PrefetchEnd::Done, Bytes(SIZE)));
    assert_eq!(resident(&file), SIZE);
    assert_eq!(report.found + report.read, Bytes(SIZE));
    let again = run(order(&[&file]), |_| ());
    assert_eq!((again.found, again.read), (Bytes(SIZE), Bytes::ZERO));
}

#[test]
fn nothing_is_read_when_called_off_or_without_memory_to_spare_and_no_more_than_the_most() {
    let folder = folder();
    let file = cold(folder.path(), "a");
    let report = run(order(&[&file]), Control::call_off);
    assert_eq!(
        (report.end, report.read),
        (PrefetchEnd::CalledOff, Bytes::ZERO)
    );
    let report = run(order(&[&file]), |control| control.set_spare(Bytes::ZERO));
    assert_eq!(
        (report.end, report.read),
        (PrefetchEnd::NoRoom, Bytes::ZERO)
    );
    let few = PrefetchOrder {
        most: Bytes::mib(8),
        reason: PrefetchReason::Idle,
        ..order(&[&file])
    };
    let report = run(few, |_| ());
    assert_eq!(report.end, PrefetchEnd::NoRoom);
    // The kernel reads some more ahead by itself.
    assert!(report.read <= Bytes::mib(9), "{report:?}");
    assert!(resident(&file) <= 32 << 20, "{}", resident(&file));
}

#[tokio::test]
async fn dropping_an_order_ends_it_within_a_piece_and_it_still_reports() {
    let folder = folder();
    let files: Vec<_> = (0..8)
        .map(|number| cold(folder.path(), &number.to_string()))
        .collect();
    #[expect(clippy::disallowed_methods, reason = "one report is all that comes")]
    let (events, mut told) = mpsc::unbounded_channel();
    let all: Vec<_> = files.iter().collect();
    drop(Prefetching::start(order(&all), Clock::start(), events));
    let Some(WorkerEvent::Prefetched(report)) = told.recv().await else {
        panic!("an order reports");
    };
    assert_eq!(report.end, PrefetchEnd::CalledOff);
    assert!(report.read < Bytes(SIZE), "{report:?}");
    assert!(told.recv().await.is_none());
}

#[tokio::test]
async fn a_survey_tells_what_is_cached_of_each_model_and_looks_again_when_told() {
    let folder = folder();
    let file = cold(folder.path(), "a");
    let survey = Survey::start(Clock::start());
    let none = ModelName::new("none").expect("a good name");
    survey.look_at([(model(), vec![file.clone()]), (none.clone(), Vec::new())].into());
    let until = async |wanted: &dyn Fn(Cached) -> bool| {
        let found = async {
            loop {
                if let Some(found) = survey.found().get(&model()).filter(|f| wanted(**f)) {
                    return *found;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), found).await
    };
    let cold = until(&|_| true).await.expect("it is looked at");
    assert_eq!(cold.size, Bytes(SIZE));
    assert!(cold.bytes < Some(Bytes(SIZE / 10)), "{cold:?}");
    assert_eq!(survey.found()[&none].bytes, None);
    // What was read may be gone again where other tests use all memory.
    for _ in 0..5 {
        drop(fs::read(&file).expect("it can be read"));
        survey.again();
        if until(&|found| found.bytes == Some(found.size))
            .await
            .is_ok()
        {
            return;
        }
    }
    panic!("it is not looked at again: {:?}", survey.found());
}
