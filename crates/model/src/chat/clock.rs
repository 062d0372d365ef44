//! `strftime_now` of chat templates: the date, in UTC, as C's `strftime` spells it.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment, split as the calendar splits it.
struct Moment {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, Sunday.
    weekday: usize,
    /// From 1.
    day_of_year: i64,
    second_of_day: i64,
}

impl Moment {
    /// Civil date of a Unix time (H. Hinnant, "chrono-compatible low-level date algorithms").
    fn new(unix_seconds: i64) -> Self {
        let days = unix_seconds.div_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        // Years that begin in March, so that the leap day is the last.
        let day_of_march_year =
            day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
        let month = (march_month + 2) % 12;
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before_month = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize];
        Self {
            year,
            month: month as usize,
            day,
            weekday: (days + 4).rem_euclid(7) as usize,
            day_of_year: before_month + day + i64::from(leap && month > 1),
            second_of_day: unix_seconds.rem_euclid(86_400),
        }
    }

    /// The text of one directive; `None` if it is not known.
    fn directive(&self, directive: char) -> Option<String> {
        let (hour, minute) = (self.second_of_day / 3600, self.second_of_day / 60 % 60);
        let (day, month) = (DAYS[self.weekday], MONTHS[self.month]);
        Some(match directive {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'm' => format!("{:02}", self.month + 1),
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => day.into(),
            'a' => day[..3].into(),
            'w' => self.weekday.to_string(),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.into(),
            'M' => format!("{minute:02}"),
            'S' => format!("{:02}", self.second_of_day % 60),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{hour:02}:{minute:02}:{:02}", self.second_of_day % 60),
            'Z' => "UTC".into(),
            'z' => "+0000".into(),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }
}

/// Formats a Unix time. Unknown directives stay as they are; `%-d` drops leading zeros.
fn strftime(format: &str, unix_seconds: i64) -> String {
    let moment = Moment::new(unix_seconds);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let rest = characters.as_str();
        let unpadded = rest.starts_with('-');
        let directive = rest.chars().nth(usize::from(unpadded));
        match directive.and_then(|directive| moment.directive(directive)) {
            Some(field) => {
                let field = if unpadded { field.trim_start_matches(['0', ' ']) } else { &field };
                text.push_str(if field.is_empty() { "0" } else { field });
                characters.nth(usize::from(unpadded));
            }
            None => text.push('%'),
        }
    }
    text
}

/// The present moment by `format`.
pub(super) fn strftime_now(format: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, i64::try_from(since.as_secs()).unwrap_or(i64::MAX / 2))
}

#[cfg(test)]
mod tests {
    use super::strftime;

    // Expected values are Python's datetime.fromtimestamp(t, timezone.utc).strftime(format).
    #[test]
    fn equals_python() {
        assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", 0), "1970-01-01 00:00:00");
        assert_eq!(
            strftime("%A, %B %d, %Y (%j)", 1_709_208_000),
            "Thursday, February 29, 2024 (060)"
        );
        assert_eq!(strftime("%-d/%-m %I %p 100%% %Q", 1_735_689_599), "31/12 11 PM 100% %Q");
        assert_eq!(strftime("%F %T", 951_827_696), "2000-02-29 12:34:56");
    }
}
